"""k-sample self-critical sequence training (SCST) of encoder-decoders: T5, Flan-T5, BART, for which TRL has no trainer.

REINFORCE whose baseline is the mean reward of the other samples of the same prompt (Rennie et al. 2017; k samples: Luo 2020,
arXiv 2003.09971; EMORL, arXiv 2505.02579):

    loss = mean over samples of [ -A log p(y|x) + beta * sum over tokens t of KL(policy || base)(. | x, y_<t) ]

Departures from the authors' code: its KL term, one number for the whole batch times advantages that sum to zero, is identically
zero, here it is the exact divergence of every token's distribution and not multiplied by anything but `beta`; log-probabilities
are those of the sampled ids, their end token included, not of a text that was cleaned and tokenised again; dropout is off, so
that what is sampled and what is learned from is one distribution; the baseline leaves its own sample out (`group_mean` is
theirs, the same but for the factor (k-1)/k); nothing is cut off the distribution (theirs: transformers' top_k of 50).
Its reward, log(score), is the objective's `transform: {log: true}`.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from trl.models import unwrap_model_for_generation

from emorl.policies.conversation import as_completion
from emorl.policies.generation import end_tokens
from emorl.policies.prompts import decode, encode
from emorl.training.advantages import AGGREGATIONS, BASELINES, advantages_of

SCALES = ("none", "group")

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass
class SCSTConfig(Seq2SeqTrainingArguments):
    """transformers' training arguments and these; names and meanings are TRL's GRPOConfig's wherever it has them.

    `per_device_train_batch_size` counts prompts, the rows of the data set (TRL: completions).
    """

    num_generations: int = field(default=3, metadata={"help": "samples per prompt, at least 2 (paper: 3)"})
    max_completion_length: int = field(default=64, metadata={"help": "most tokens sampled (paper: 64)"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and of the probabilities learned from"})
    top_k: int = field(default=0, metadata={"help": "sample among this many tokens; 0: all (paper: 50, unmentioned)"})
    top_p: float = field(default=1.0, metadata={"help": "sample among the tokens that have this share of probability"})
    beta: float = field(default=0.05, metadata={"help": "weight of the KL to the base (paper: 0.05, without effect there)"})
    baseline: str = field(default="leave_one_out", metadata={"help": f"of a sample's reward: {' or '.join(BASELINES)}"})
    scale_rewards: str = field(
        default="none", metadata={"help": "group divides by the standard deviation of a prompt's rewards"}
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "with several rewards: their weighted sum, or (normalize_then_sum, GDPO) each normalised first; then "
            "normalised in the batch of one process, without baseline and scale_rewards"
        },
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "of several rewards; all 1 by default"})
    disable_dropout: bool = field(default=True, metadata={"help": "train without dropout, as is sampled"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False  # the objectives get them
        for name, known in (
            ("baseline", BASELINES),
            ("multi_objective_aggregation", AGGREGATIONS),
            ("scale_rewards", SCALES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")
        if self.num_generations < 2:
            raise ValueError(f"num_generations: a sample needs another one as its baseline, got {self.num_generations}")
        if self.gradient_checkpointing and self.disable_dropout:
            raise ValueError("gradient_checkpointing works in training mode only: it needs disable_dropout=False")
        if self.temperature <= 0 or self.beta < 0:
            raise ValueError(f"expected temperature > 0 and beta >= 0, got {self.temperature} and {self.beta}")


@dataclass(frozen=True)
class Samples:
    """Samples of B prompts, G each: N = B * G rows, those of a prompt together."""

    inputs: Mapping[str, Tensor]  # the encoder's input_ids and attention_mask, (N, S)
    ids: Tensor  # (N, T) what was sampled, with the end token
    mask: Tensor  # (N, T) 1 up to the end token and on it
    advantages: Tensor  # (N,)


class SCSTTrainer(Seq2SeqTrainer):
    """Trains an encoder-decoder on rewards instead of labels.

        trainer = SCSTTrainer(model, reward_funcs=[politeness], args=SCSTConfig("out"), train_dataset=prompts,
                              processing_class=tokenizer, peft_config=LoraConfig(task_type="SEQ_2_SEQ_LM"))
        trainer.train()

    `reward_funcs` follow TRL's convention (`prompts`, `completions`, `completion_ids` and the data set's columns as
    keywords; a number or None per completion; maximised). The data set has a column `prompt`. Everything else is
    transformers' Trainer: `report_to`, `resume_from_checkpoint`, `accelerate launch`, gradient accumulation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: Sequence[RewardFunction],
        args: SCSTConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        if not model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} has no encoder; train a decoder with TRL's GRPOTrainer")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one process per GPU with accelerate launch or torchrun"
            )
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(reward_funcs)
        if len(weights) != len(reward_funcs):
            raise ValueError(f"reward_weights: expected {len(reward_funcs)}, one for each reward, got {len(weights)}")
        self.ref_model = None
        if peft_config is None and args.beta > 0:  # with an adapter, the base is the model without it
            self.ref_model = copy.deepcopy(model).eval().requires_grad_(False)
        set_seed(args.seed)  # a new adapter is random
        policy: Any = model if peft_config is None else get_peft_model(model, peft_config)
        super().__init__(
            model=policy,
            args=args,
            data_collator=_as_rows,  # pyright: ignore[reportArgumentType]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so Trainer divides by the accumulated batches
        self.reward_funcs = list(reward_funcs)
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        self._settings = args
        self._tokenizer = processing_class
        self._generation = _sampling(model, processing_class, args)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        if self.ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        set_seed(args.seed, device_specific=True)  # processes sample with random numbers of their own

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # called by Trainer with rows of the data set
        samples = self.sample(inputs)
        loss = self.loss_of(model, samples)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def sample(self, rows: Sequence[Mapping[str, Any]]) -> Samples:
        """Samples of each row's prompt with their advantages."""
        settings = self._settings
        prompts = [row["prompt"] for row in rows]
        inputs = encode(self._tokenizer, prompts).to(self.accelerator.device)
        assert self.model is not None
        training = self.model.training
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            policy: Any = model.eval()
            bare = policy.get_base_model() if isinstance(policy, PeftModel) else policy
            own, bare.generation_config = bare.generation_config, self._generation
            try:
                output = policy.generate(**inputs)
            finally:
                bare.generation_config = own
                policy.train(training)
        ids = output[:, 1:]  # behind the decoder's start token
        mask = _up_to_end(ids, self._generation.eos_token_id)
        rewards = self._rewards(rows, ids, mask)
        advantages = advantages_of(
            rewards, self.reward_weights.to(rewards), settings.num_generations, baseline=settings.baseline,
            aggregation=settings.multi_objective_aggregation, scale=settings.scale_rewards == "group",
        )  # fmt: skip
        self._record("completions/mean_length", mask.sum(1).float().mean())
        repeated = {name: value.repeat_interleave(settings.num_generations, 0) for name, value in inputs.items()}
        return Samples(repeated, ids, mask, advantages)

    def loss_of(self, model: Any, samples: Samples) -> Tensor:
        """The loss at the top of this file, of samples drawn before; a scalar."""
        if self._settings.disable_dropout:
            model.eval()  # every step; Trainer switches it back
        log_p = self._log_probabilities(model, samples)  # (N, T, V)
        chosen = log_p.gather(-1, samples.ids[..., None])[..., 0]  # (N, T)
        loss = -(samples.advantages * (chosen * samples.mask).sum(1)).mean()
        if self._settings.beta > 0:
            with torch.no_grad():
                if self.ref_model is None:
                    with self.accelerator.unwrap_model(model).disable_adapter():
                        log_q = self._log_probabilities(model, samples)
                else:
                    log_q = self._log_probabilities(self.ref_model, samples)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1) * samples.mask  # (N, T), exact: over the whole vocabulary
            loss = loss + self._settings.beta * kl.sum(1).mean()
            self._record("kl", kl.detach().sum() / samples.mask.sum())
        return loss

    def _log_probabilities(self, model: Any, samples: Samples) -> Tensor:
        """Of every next token, (N, T, V), at the temperature that sampled; the decoder reads what was sampled before it."""
        begin = samples.ids.new_full((len(samples.ids), 1), self._generation.decoder_start_token_id)
        decoder_ids = torch.cat([begin, samples.ids[:, :-1]], 1)  # padding behind the end is read by nobody before it
        logits = model(**samples.inputs, decoder_input_ids=decoder_ids, use_cache=False).logits
        return (logits.float() / self._settings.temperature).log_softmax(-1)

    def _rewards(self, rows: Sequence[Mapping[str, Any]], ids: Tensor, mask: Tensor) -> Tensor:
        """(N, O); NaN where an objective cannot score."""
        repeated = [row for row in rows for _ in range(self._settings.num_generations)]
        prompts = [row["prompt"] for row in repeated]
        texts = decode(self._tokenizer, ids)
        completions = [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        completion_ids = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        columns = {name: [row[name] for row in repeated] for name in rows[0] if name != "prompt"}
        scored = [
            function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            for function in self.reward_funcs
        ]
        rewards = torch.tensor(
            [[torch.nan if reward is None else float(reward) for reward in one] for one in scored], device=ids.device
        ).T
        for function, column in zip(self.reward_funcs, rewards.T, strict=True):
            self._record(f"rewards/{getattr(function, '__name__', 'reward')}/mean", column.nanmean())
        total = (rewards * self.reward_weights.to(rewards)).nansum(1)
        self._record("reward", total.mean())
        self._record("reward_std", total.view(-1, self._settings.num_generations).std(1).mean())
        return rewards

    def _record(self, name: str, value: Tensor) -> None:
        self._metrics[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was recorded since the last log, over all processes."""
        if self._metrics and "loss" in logs:
            everyone = gather_object([dict(self._metrics)])
            names = dict.fromkeys(name for one in everyone for name in one)
            values = {name: [value for one in everyone for value in one.get(name, [])] for name in names}
            logs = {**logs, **{name: sum(found) / len(found) for name, found in values.items()}}
            self._metrics.clear()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **_: Any
    ) -> tuple[Tensor, None, None]:
        """The loss alone, of samples drawn for the evaluation; called by `evaluate()`."""
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


def _sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SCSTConfig) -> Any:
    """Sampling from the policy itself: what else a model's own generation config asks for (forced tokens, penalties) would give
    samples of another distribution than the one that is learned from."""
    own: Any = model.generation_config
    start = own.decoder_start_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        num_return_sequences=settings.num_generations,
        max_new_tokens=settings.max_completion_length,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id if start is None else start,
    )


def _up_to_end(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """1 up to and on the first end token, 0 behind it; like `ids`, (N, T)."""
    is_end = torch.isin(ids, torch.tensor(list(ends), device=ids.device))
    return ((is_end.cumsum(1) - is_end.long()) == 0).long()


def _as_rows(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return features
