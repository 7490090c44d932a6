"""A reward model over a frozen sentence encoder: does this response fit this prompt, and in which form?

Prompt and response are embedded apart; a small network reads the response's embedding, its product with and distance to the
prompt's, and a few surface features. Fine-tuning the same encoder on joint pairs learned the form but not the match (right
response, wrong client: AUC 0.51 after 11 minutes); this learns both in two minutes. Platt calibration is folded into the
last layer. Saved as `head.safetensors` and `config.json`; use it in an experiment as

    function: reward_models.sentence_pair:SentencePair
    model: ./runs/reward_models/reflection
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from emorl.data import completion_text, prompt_text
from emorl.objectives.batching import score_in_batches
from reward_models.pair_data import Pair

OPENINGS = ("you", "i", "it", "so", "what", "how", "have", "do", "that", "your")
_MAX_TOKENS = 96
_CACHED_TEXTS = 20_000


@dataclass(frozen=True)
class HeadTraining:
    """How the head is trained; the encoder stays as it is."""

    encoder: str
    seed: int = 0
    hidden: int = 64
    epochs: int = 40
    patience: int = 6
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


class SentenceEncoder:
    """Normalised mean-pooled embeddings of texts, remembered while there is room."""

    def __init__(self, path: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModel.from_pretrained(path, use_safetensors=True).eval().requires_grad_(False)
        self._known: dict[str, Tensor] = {}
        self.size: int = self._model.config.hidden_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, H)."""
        new = sorted(set(texts) - self._known.keys(), key=len)
        if len(self._known) + len(new) > _CACHED_TEXTS:
            self._known.clear()
            new = sorted(set(texts), key=len)
        for start in range(0, len(new), 64):
            batch = new[start : start + 64]
            inputs = self._tokenizer(batch, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            pooled = (self._model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            self._known.update(zip(batch, functional.normalize(pooled, dim=-1), strict=True))
        return torch.stack([self._known[text] for text in texts])


def surface(prompt: str, response: str) -> list[float]:
    """Form of a response: share of its words from the prompt, questions, length, repetition, first word."""
    asked, said = re.findall(r"[a-z']+", prompt.lower()), re.findall(r"[a-z']+", response.lower())
    words = max(1, len(said))
    return [
        sum(word in asked for word in said) / words,
        float("?" in response),
        min(words, 60) / 30,
        min(words, 6) / 6,
        len(set(said)) / words,
        sum(word in ("you", "your", "you're", "you've") for word in said) / words,
        sum(word in ("i", "i'm", "my", "me", "i've") for word in said) / words,
        *(float(bool(said) and said[0].split("'")[0] == word) for word in OPENINGS),
    ]


class SentencePair:
    """An objective with scores in [0, 1], from a folder that `train` wrote.

    Args:
        model: that folder.
        batch_size: pairs scored together.
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, model: str, batch_size: int = 256) -> None:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} holds no reward model (no config.json); train it first, reward_models/README.md says how"
            )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._encoder = SentenceEncoder(config["encoder"])
        self._head = make_head(self._encoder, config["hidden"])
        self._head.load_state_dict(load_file(folder / "head.safetensors"))
        self._head.eval()
        self._batch_size = batch_size

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        pairs = list(zip(map(prompt_text, prompts), map(completion_text, completions), strict=True))
        return score_in_batches(pairs, self._scores, self._batch_size)

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return self._head(features(self._encoder, pairs)).sigmoid()[:, 0].tolist()


def make_head(encoder: SentenceEncoder, hidden: int) -> nn.Sequential:
    inputs = 3 * encoder.size + 1 + len(surface("", ""))
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(0.3), nn.Linear(hidden, 1))


def features(encoder: SentenceEncoder, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """(N, 3 H + surface features) of (prompt, response) pairs, each part scaled to about unit size."""
    prompts, responses = encoder([prompt for prompt, _ in pairs]), encoder([response for _, response in pairs])
    similarity = (prompts * responses).sum(1, keepdim=True)
    form = torch.tensor([surface(prompt, response) for prompt, response in pairs])
    return torch.cat([responses, 20 * prompts * responses, 4 * (prompts - responses).abs(), 5 * similarity, form], 1)


def train(training: Sequence[Pair], stopping: Sequence[Pair], settings: HeadTraining, output: Path) -> SentencePair:
    """Trains the head on graded targets with binary cross-entropy, keeps the epoch with the lowest loss on `stopping`,
    calibrates it there and saves it. Same seed, same head."""
    torch.manual_seed(settings.seed)
    encoder = SentenceEncoder(settings.encoder)
    x, y = _inputs(encoder, training)
    x_stop, y_stop = _inputs(encoder, stopping)
    head = make_head(encoder, settings.hidden)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, since, kept = float("inf"), 0, {}
    for _ in range(settings.epochs):
        head.train()
        for rows in torch.randperm(len(x)).split(settings.batch_size):
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(head(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
        head.eval()
        loss = functional.binary_cross_entropy_with_logits(head(x_stop)[:, 0], y_stop).item()
        since = since + 1 if loss >= best else 0
        if loss < best:
            best, kept = loss, {name: value.clone() for name, value in head.state_dict().items()}
        if since >= settings.patience:
            break
    head.load_state_dict(kept)
    _calibrate_in_place(head, x_stop, y_stop)
    output.mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), output / "head.safetensors")
    (output / "config.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    return SentencePair(str(output))


def _inputs(encoder: SentenceEncoder, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    x = features(encoder, [(pair.prompt, pair.response) for pair in pairs])
    return x, torch.tensor([pair.target for pair in pairs])


def _calibrate_in_place(head: nn.Sequential, x: Tensor, y: Tensor) -> None:
    """Platt scaling (slope and offset of the logit, by LBFGS on held-out pairs), folded into the last layer."""
    with torch.no_grad():
        logits = head(x)[:, 0]
    scale = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.binary_cross_entropy_with_logits(logits * scale[0] + scale[1], y)
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    last = head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(scale[0])
        last.bias.mul_(scale[0]).add_(scale[1])
