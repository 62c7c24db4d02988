"""The package's operators: the loss of a frozen head, and the steering of the residual stream.

Each lives in a folder of the same name; `from dive_fast.ops.steer import spec` reaches inside the folder, while
`dive_fast.ops.steer` is the function.
"""

from dive_fast.ops.linear_cross_entropy import LossStats, TeacherStatistics, linear_cross_entropy, teacher_statistics
from dive_fast.ops.steer import steer

__all__ = ["LossStats", "TeacherStatistics", "linear_cross_entropy", "steer", "teacher_statistics"]
