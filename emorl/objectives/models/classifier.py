"""An objective that is the probability of a label under a sequence classifier from a folder or the hub."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification

from emorl.config import nearest
from emorl.objectives.models.batching import score_in_batches
from emorl.objectives.models.frozen_model import Dtype, batch_tolerance, load_frozen, longest_input
from emorl.objectives.models.joint_encoding import encode_jointly
from emorl.policies.conversation import completion_text, prompt_text
from emorl.policies.loading import read_tokenizer

logger = logging.getLogger(__name__)


class Classifier:
    """Scores in [0, 1]: sigmoid of a single logit or of a multi-label model's `label`, else the softmax probability of
    `label`. Models of `emorl train-reward` carry a calibration of their logits, which is applied.

    What is longer than the model reads loses its end, the longer of prompt and completion first; the first time is logged.

    Args:
        model: folder or hub id of any `AutoModelForSequenceClassification` with safetensors weights.
        label: name of the label that is wanted, or several whose probabilities are averaged; not needed where the model has
            a single logit.
        with_prompt: encode (prompt, completion) as a pair; False reads the completion alone.
        batch_size: completions per forward pass; they are sorted by length first.
        dtype: `auto` computes as the weights were saved; `bfloat16` is faster in batches where the processor multiplies in
            it (benchmarks/README.md) and moves scores by a few thousandths; `float32`.

    >>> Classifier("org/toxicity", label="non-toxic")(prompts=["Hi"], completions=["Hello!"])  # doctest: +SKIP
    [0.98]
    """

    range: ClassVar = (0.0, 1.0)

    def __init__(
        self,
        model: str,
        label: str | Sequence[str] | None = None,
        with_prompt: bool = True,
        batch_size: int = 64,
        dtype: Dtype = "auto",
    ) -> None:
        self._model = load_frozen(AutoModelForSequenceClassification, model, dtype)
        self._tokenizer = read_tokenizer(model, "model")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._model.config.pad_token_id is None:  # a decoder reads its score behind the last token that is not padding
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self.batch_tolerance = batch_tolerance(self._model)
        self._with_prompt = with_prompt
        self._batch_size = batch_size
        config = self._model.config
        self._longest = min(self._tokenizer.model_max_length, longest_input(self._model) or self._tokenizer.model_max_length)
        self._tokenizer.model_max_length = self._longest
        self._has_cut = False
        labels = [label] if label is None or isinstance(label, str) else label
        self._columns = [_label_index(model, config.id2label, wanted) for wanted in labels]
        self._independent = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        calibration = getattr(config, "calibration", [[1.0, 0.0]] * config.num_labels)
        self._slopes, self._offsets = torch.tensor(calibration, device=self._model.device).T  # (labels,) each

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [sum(row) / len(row) for row in self.probabilities(prompts, completions)]

    def probabilities(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[float]]:
        """The probability of each wanted label, a row for each completion."""
        texts = [completion_text(completion) for completion in completions]
        pairs = list(zip(map(prompt_text, prompts), texts, strict=True))
        return score_in_batches(pairs, self._batch, self._batch_size)

    @torch.no_grad()
    def _batch(self, pairs: Sequence[tuple[str, str]]) -> list[list[float]]:
        prompts, completions = ([self._beginning(text) for text in side] for side in zip(*pairs, strict=True))
        inputs = encode_jointly(self._tokenizer, completions, prompts if self._with_prompt else None)
        if not self._has_cut and any(encoding.overflowing for encoding in inputs.encodings or ()):
            self._has_cut = True
            logger.warning("classifier: a text longer than the model's %d tokens was cut (said once)", self._longest)
        logits = self._model(**inputs.to(self._model.device)).logits.float() * self._slopes + self._offsets  # (B, labels)
        probabilities = logits.sigmoid() if self._independent else logits.softmax(-1)
        return probabilities[:, self._columns].tolist()

    def _beginning(self, text: str) -> str:
        """As many tokens of a very long text as the model reads: cutting pairs takes time that grows with the cut, squared."""
        if len(text) <= 4 * self._longest or not self._tokenizer.is_fast:
            return text
        ends = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return text[: ends[min(self._longest, len(ends)) - 1][1]] if ends else text


def _label_index(model: str, id2label: dict[int, str], label: str | None) -> int:
    """The wanted label's column."""
    if label is None and len(id2label) == 1:
        return 0
    names = {name: index for index, name in id2label.items()}
    if label is None:
        raise ValueError(f"classifier {model!r} has the labels {', '.join(names)}; say which with `label:`")
    if label not in names:
        raise ValueError(f"classifier {model!r} has no label {label!r}; {nearest(label, names)}")
    return names[label]
