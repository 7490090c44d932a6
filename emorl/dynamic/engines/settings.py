"""A model's own generation settings as `generate()` obeys them: transformers' logits processors, for texts that engines write.

Penalties, suppressed and forced tokens, lengths and top_k change scores here too. What an engine cannot do is refused
(guidance, which reads each text twice) or said once (beams, stop strings, other ways of sampling).
"""

import functools
import logging
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMode

from emorl.dynamic.engines.engine import Decoding

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def check_settings(name: str, model: PreTrainedModel) -> None:
    """Refuses or says what no engine does of a model's generation settings.

    Raises:
        ValueError: a guidance scale.
    """
    config: Any = model.generation_config
    if config is None:
        return
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"{name} has guidance_scale={config.guidance_scale} in its generation_config, and a dynamic ensemble reads each "
            "text once; set it to null in generation_config.json."
        )
    others = {key: getattr(config, key) for key in ("stop_strings", "max_time") if getattr(config, key)}
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or others:
        wanted = others or mode.value
        _say(f"{name} asks for {wanted} in its generation_config; a dynamic ensemble decodes greedily or samples without it")


def say_sampling(name: str, model: PreTrainedModel, decoding: Decoding) -> None:
    """Says which of a model's sampling settings are not followed, where texts are sampled."""
    config = model.generation_config
    settings = {key: getattr(config, key, None) for key in _SAMPLING}
    used = {"temperature": decoding.temperature, "top_p": decoding.top_p}
    ignored = {key: value for key, value in settings.items() if value and value != used.get(key, 1.0)}
    if decoding.temperature > 0 and ignored:
        _say(f"{name} asks for {ignored} in its generation_config; texts are sampled with {used}")


@functools.cache  # once, not for each batch
def _say(line: str) -> None:
    logger.warning(line)


def processors_of(
    model: PreTrainedModel, decoding: Decoding, ids: Tensor, mask: Tensor | None, source: Tensor | None = None
) -> LogitsProcessorList:
    """What changes the scores (B, V) of texts that begin with prompts `ids` (B, T), as `generate()` would; often nothing.

    Args:
        mask: which of `ids` are no padding.
        source: what an encoder read, (B, S), where `ids` are a decoder's.
    """
    generating: Any = model
    samples = decoding.temperature > 0
    top_k = getattr(model.generation_config, "top_k", None) or 0  # transformers' own default, 50, is nobody's choice
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": top_k, **dict.fromkeys(_SAMPLING[2:])} if samples else {}
    config, _ = generating._prepare_generation_config(
        None, do_sample=samples, num_beams=1, max_new_tokens=decoding.max_new_tokens, **neutral
    )
    generating._prepare_special_tokens(config, True, device=ids.device)
    config = generating._prepare_generated_length(config, True, True, "input_ids", ids.shape[1], ids)
    return generating._get_logits_processor(
        config,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids if source is None else source,
        device=ids.device,
        model_kwargs={"attention_mask": mask},
    )
