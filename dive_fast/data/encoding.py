"""From records to token ids: prompts through the model's own template and processor, reports with EOS as a label.

The same encoder serves training, the teacher and generation, so that the prompt of a report is the same everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dive_fast.data.images import load_image
from dive_fast.errors import InputError

TOKEN_ALIGNED = ("token_type_ids", "mm_token_type_ids")
"""Processor outputs with one entry per token besides input_ids and attention_mask."""


@dataclass(frozen=True)
class Response:
    """A report as tokens: `ids` ends with EOS; `offsets` are the character spans of all ids but the EOS."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def response_tokens(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a report alone, without special tokens and without EOS, and each token's characters [start, end).

    Raises:
        InputError: the tokenizer gives no offsets (it is a slow one) or has no EOS token.
    """
    if not isinstance(text, str):
        raise InputError(f"text: expected a str, got {type(text).__name__}")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "tokenizer: expected a fast tokenizer, because decisive spans need character offsets; "
            f"{type(tokenizer).__name__} has none. Load it with AutoTokenizer.from_pretrained(...) from a folder with "
            "a tokenizer.json; of a processor pass processor.tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} has no EOS token, so a report could not end; set "
            "tokenizer.eos_token to the token that ends the model's turn"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


class ReportEncoder:
    """Encodes prompts (with images and demonstrations) and reports for one processor.

    Args:
        processor: a fast tokenizer, or a processor that holds one (`processor.tokenizer`).
        context_length: tokens the model can see; None: no limit is checked.

    Attributes:
        end_token_id: what ends a report: the special token that the chat template writes behind an assistant's turn
            (<|im_end|>, <end_of_turn>, <end_of_utterance>), which a chat model was trained to stop with and which need
            not be the tokenizer's EOS (Gemma's is <eos>); the EOS where the template writes none or there is none.

    Raises:
        InputError: the tokenizer gives no character offsets (not a fast one) or has no EOS token; a chat template that
            fails.
    """

    def __init__(self, processor, *, context_length: int | None = None):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees = self.tokenizer is not processor
        self.context_length = context_length
        response_tokens(self.tokenizer, "")  # refuses a tokenizer that could not serve
        self.end_token_id = self._end_of_turn()

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def response(self, text: str) -> Response:
        """The report's own tokens, then `end_token_id`."""
        ids, offsets = response_tokens(self.tokenizer, text)
        return Response([*ids, self.end_token_id], offsets)

    def prompt_text(self, record, demonstrations: Sequence = ()) -> str:
        """The prompt as text: demonstrations as earlier turns, then the record's turn, then the assistant's cue.

        A tokenizer without a chat template gets turns separated by blank lines, and a processor without one also one
        line with its image token per image, in front of the prompt.

        Raises:
            InputError: images for a model that only reads text; image tokens that are not the record's images.
        """
        if not self.sees and any(r.images for r in (*demonstrations, record)):
            raise InputError(
                f"record {record.id!r} has images, but {type(self.processor).__name__} only reads text; "
                "use a vision-language model, or leave the images out"
            )
        if self.processor.chat_template is None:
            asked = [f"{self._image_token}\n" * len(r.images) + r.prompt for r in (*demonstrations, record)]
            turns = [f"{ask}\n{demo.report}\n\n" for ask, demo in zip(asked, demonstrations, strict=False)]
            return self._checked("".join([*turns, f"{asked[-1]}\n"]), record, demonstrations)
        messages = []
        for demo in demonstrations:
            messages += [self._turn("user", demo.prompt, demo.images), self._turn("assistant", demo.report, ())]
        messages.append(self._turn("user", record.prompt, record.images))
        return self._checked(self._apply_template(messages, cue=True), record, demonstrations)

    def _apply_template(self, messages: list[dict], *, cue: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
        except (TemplateError, TypeError) as error:
            raise InputError(
                f"processor: its chat template fails on turns of user and assistant ({error}); give it another with "
                "processor.chat_template = ..."
            ) from error

    def _end_of_turn(self) -> int:
        """Read off the template, whatever family it is."""
        if self.processor.chat_template is None:
            return self.tokenizer.eos_token_id
        text = self._apply_template([self._turn("user", "A", ()), self._turn("assistant", "report", ())], cue=False)
        behind = self.tokenizer(text.rpartition("report")[2].lstrip(), add_special_tokens=False)["input_ids"]
        special = {*self.tokenizer.all_special_ids}
        special |= {token for token, entry in self.tokenizer.added_tokens_decoder.items() if entry.special}
        return behind[0] if behind and behind[0] in special else self.tokenizer.eos_token_id

    @property
    def _image_token(self) -> str | None:
        """What stands for one image in a prompt's text, before the processor expands it."""
        # Gemma's prompts have one token at an image's beginning, and others where the image is.
        return getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)

    def _checked(self, text: str, record, demonstrations: Sequence) -> str:
        token, images = self._image_token, sum(len(r.images) for r in (*demonstrations, record))
        found = images if token is None else text.count(token)
        if found > images:
            raise InputError(
                f"record {record.id!r}: its prompt has {found} image tokens ({token}) for {images} images; texts must "
                "not contain the token, images go into the record's images"
            )
        if found < images:
            raise InputError(
                f"processor: the chat template of this {type(self.processor).__name__} has room for {found} of the "
                f"{images} images of record {record.id!r}; give it a template that writes {token} for image parts"
            )
        return text

    def _turn(self, role: str, text: str, images) -> dict:
        if not self.sees:
            return {"role": role, "content": text}
        return {"role": role, "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}

    def prompts(self, records: Sequence, demonstrations: Sequence[Sequence] | None = None) -> dict[str, torch.Tensor]:
        """The processor's output for a batch of prompts, left-padded: input_ids, attention_mask, pixel_values, ...

        Raises:
            InputError: a prompt that leaves no room for a report in the model's context; an image that does not decode.
        """
        demonstrations = demonstrations or [()] * len(records)
        texts = [self.prompt_text(r, d) for r, d in zip(records, demonstrations, strict=True)]
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if self.processor.chat_template is not None:
            # As transformers has it: a tokenizer's template writes all special tokens, a processor's may leave BOS out.
            bos = self.tokenizer.bos_token
            options["add_special_tokens"] = self.sees and not (bos is not None and texts[0].startswith(bos))
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        images = [
            [load_image(image, record_id=r.id) for r in (*demos, record) for image in r.images]
            for record, demos in zip(records, demonstrations, strict=True)
        ]
        if self.sees and any(images):
            batch = self.processor(text=texts, images=images, **options)
        else:
            batch = self.tokenizer(texts, verbose=False, **options)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for record, length in zip(records, lengths, strict=True):
            if self.context_length is not None and length >= self.context_length:
                raise InputError(
                    f"record {record.id!r}: its prompt has {length} tokens and fills the model's context of "
                    f"{self.context_length}; shorten the prompt or use fewer demonstrations"
                )
        return dict(batch)

    def check_lengths(self, records: Sequence) -> None:
        """Refuse records whose text alone overflows the context, before anything is trained.

        What images add is known only when they are read; `prompts` checks it then.

        Raises:
            InputError: names the first record that does not fit.
        """
        if self.context_length is None:
            return
        for start in range(0, len(records), 1024):
            part = records[start : start + 1024]
            texts = [self.prompt_text(record) + record.report for record in part]
            # verbose=False: the tokenizer's own warning of a long text would come in front of the refusal.
            rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for record, ids in zip(part, rows, strict=True):
                if len(ids) >= self.context_length:
                    raise InputError(
                        f"record {record.id!r}: prompt and report have {len(ids) + 1} tokens, "
                        f"the model's context has {self.context_length}; shorten the record or leave it out"
                    )


def pad_rows(rows: Sequence[torch.Tensor], value: float, side: str = "right") -> torch.Tensor:
    """[len(rows), longest] of 1-D tensors."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def append_responses(prompts: dict[str, torch.Tensor], responses: Sequence[Sequence[int]], pad_token_id: int) -> dict:
    """Right-padded training rows `prompt + response` from left-padded prompts; `labels` are -100 outside responses.

    What belongs to images (pixel_values, image_grid_thw, ...) is kept as the processor made it.
    """
    mask = prompts["attention_mask"].bool()
    targets = [torch.tensor(ids, dtype=torch.long) for ids in responses]
    batch = {key: value for key, value in prompts.items() if key not in ("input_ids", "attention_mask", *TOKEN_ALIGNED)}
    heads = [ids[keep] for ids, keep in zip(prompts["input_ids"], mask, strict=True)]
    rows = list(zip(heads, targets, strict=True))
    batch["input_ids"] = pad_rows([torch.cat(row) for row in rows], pad_token_id)
    batch["attention_mask"] = pad_rows([torch.ones(len(h) + len(t), dtype=torch.long) for h, t in rows], 0)
    batch["labels"] = pad_rows([torch.cat([torch.full_like(h, -100), t]) for h, t in rows], -100)
    for key in TOKEN_ALIGNED:
        if key in prompts:
            kept = [values[keep] for values, keep in zip(prompts[key], mask, strict=True)]
            batch[key] = pad_rows(
                [torch.cat([k, torch.zeros_like(t)]) for k, (_, t) in zip(kept, rows, strict=True)], 0
            )
    return batch
