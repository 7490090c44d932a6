"""Asks a chat model from a folder or the hub: the probability of every answer from one forward per batch, exactly."""

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from emorl.config import UserError
from emorl.objectives.judge.ledger import Ledger
from emorl.objectives.judge.questions import Question, UnansweredError
from emorl.policies.loading import read_model, read_tokenizer


class LocalChat:
    """A transformers chat model, loaded when it is first asked; a pickle of it holds settings only.

    It answers with its first token, so a model that thinks aloud has to be told not to, by `chat_template_kwargs`.
    """

    def __init__(self, model: str, chat_template_kwargs: dict[str, Any], minimum_share: float, batch_size: int) -> None:
        self._path = str(Path(model).expanduser()) if model.startswith("~") else model
        self._chat_template_kwargs = chat_template_kwargs
        self._minimum_share, self._batch_size = minimum_share, batch_size

    def __str__(self) -> str:
        return f"model {self._path!r}"

    def identity(self) -> list[Any]:
        """What an answer depends on besides the question: a folder's files are told apart by size and time."""
        files = [file for file in sorted(Path(self._path).glob("*")) if file.is_file()]
        version = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return ["local", self._path, version, self._chat_template_kwargs, self._minimum_share]

    async def answer_all(
        self, questions: Sequence[Question], ledger: Ledger, keep: Callable[[Question, float], None], stop_at_failure: bool
    ) -> dict[Question, UnansweredError]:
        """Hands each question's value to `keep`, batch by batch; returns those without a valid answer.

        Raises:
            UserError: the model cannot be loaded or has no chat template, or a label is no single token of it.
        """
        failures: dict[Question, UnansweredError] = {}
        waiting = sorted(questions, key=lambda question: len(question.text))
        for start in range(0, len(waiting), self._batch_size):
            batch = waiting[start : start + self._batch_size]
            too_long = {question for question in batch if not self._fits(question)}
            failures |= {question: UnansweredError("the question is longer than the model can read") for question in too_long}
            batch = [question for question in batch if question not in too_long]
            for question, probabilities in zip(batch, self.probabilities(batch), strict=True):
                try:
                    keep(question, question.expected_value(probabilities, self._minimum_share))
                except UnansweredError as failure:
                    failures[question] = failure
            if failures and stop_at_failure:
                break
            await asyncio.sleep(0)  # let judges behind endpoints go on
        return failures

    @torch.no_grad()
    def probabilities(self, questions: Sequence[Question]) -> list[dict[str, float]]:
        """Of each label as the first token of the answer; together less than 1. All questions have the same labels."""
        if not questions:
            return []
        tokenizer, model = self._loaded
        ids = self._label_ids(questions[0].labels)
        inputs = self._encode([question.messages for question in questions], padding=True, return_tensors="pt")
        once = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        generate: Any = model.generate  # knows how this family numbers left-padded positions
        output = generate(**inputs.to(model.device), generation_config=once, output_logits=True, return_dict_in_generate=True)
        probabilities = output.logits[0].float().softmax(-1)  # (B, V)
        labels = {label: probabilities[:, tokens].sum(1).tolist() for label, tokens in ids.items()}  # label -> (B,)
        return [{label: values[row] for label, values in labels.items()} for row in range(len(questions))]

    def _encode(self, conversations: Any, **options: Any) -> Any:
        tokenizer, _ = self._loaded
        template = {"add_generation_prompt": True, "return_dict": True, **self._chat_template_kwargs}
        return tokenizer.apply_chat_template(conversations, **template, **options)

    def _fits(self, question: Question) -> bool:
        _, model = self._loaded
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # some families have no limit
        return longest is None or len(self._encode(question.messages)["input_ids"]) < longest

    def _label_ids(self, labels: Sequence[str]) -> dict[str, list[int]]:
        """Every token that reads as the label, with or without a blank before it."""
        ids = {label: [token for token, text in enumerate(self._vocabulary) if text == label] for label in labels}
        missing = [label for label, tokens in ids.items() if not tokens]
        if missing:
            raise UserError(f"judge {self}: its tokenizer has no single token for {', '.join(missing)}; choose another scale")
        return ids

    @cached_property
    def _vocabulary(self) -> list[str]:
        tokenizer, _ = self._loaded
        special = set(tokenizer.all_special_ids)
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        return ["" if token in special else text.strip() for token, text in enumerate(texts)]

    @cached_property
    def _loaded(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        tokenizer = read_tokenizer(self._path, "judge model")
        if tokenizer.chat_template is None:
            raise UserError(f"judge {self}: it has no chat template, so it cannot be asked; choose a chat model")
        model = read_model(AutoModelForCausalLM, self._path, "judge model")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        return tokenizer, model

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_loaded", "_vocabulary")}
