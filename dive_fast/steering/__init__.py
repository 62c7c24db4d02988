"""Steering adapters as a PEFT method: `peft.get_peft_model(base, DiveConfig(...))`."""

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

if "DIVE" not in PeftType.__members__:
    # PEFT looks methods up in this enum, and an enum cannot be subclassed once it has members: add ours the way
    # enum itself builds one. Replaced by PEFT's own member should it ever have one.
    _member = str.__new__(PeftType, "DIVE")
    _member._name_ = "DIVE"
    _member._value_ = "DIVE"
    PeftType._member_map_["DIVE"] = _member
    PeftType._value2member_map_["DIVE"] = _member
    PeftType._member_names_.append("DIVE")
    type.__setattr__(PeftType, "DIVE", _member)

from dive_fast.steering.config import KINDS, DiveConfig  # noqa: E402
from dive_fast.steering.layer import DiveLayer  # noqa: E402
from dive_fast.steering.model import DiveModel  # noqa: E402
from dive_fast.steering.positions import response_positions_from_labels  # noqa: E402

register_peft_method(name="dive", config_cls=DiveConfig, model_cls=DiveModel)

__all__ = ["KINDS", "DiveConfig", "DiveLayer", "DiveModel", "response_positions_from_labels"]
