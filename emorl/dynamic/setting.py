"""What agents learn in, and are compared in."""

from dataclasses import dataclass

from emorl.config.dynamic import AgentKind, DynamicConfig
from emorl.data import Splits
from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import WeightChooser
from emorl.dynamic.answer_value import AnswerValue
from emorl.dynamic.engines.engine import Decoding, Engine
from emorl.dynamic.ensemble import DynamicEnsemble, Span
from emorl.dynamic.models import Models


@dataclass(frozen=True)
class Setting:
    """Who writes, about what and how, and what the answers are worth."""

    engine: Engine
    models: Models
    splits: Splits
    value: AnswerValue
    decoding: Decoding
    config: DynamicConfig
    seed: int

    def new_agent(self, kind: AgentKind) -> SpanAgent:
        """As it is before it learns anything."""
        config, engine = self.config, self.engine
        agent = SpanAgent(
            kind, len(engine.names), engine.state_width, config.agent, config.ppo.first_deviation, self.seed
        )  # fmt: skip
        return agent.to(engine.device)

    def ensemble(self, chooser: WeightChooser, span: Span | None = None) -> DynamicEnsemble:
        """The models under what chooses their weights."""
        span = self.config.span if span is None else span
        return DynamicEnsemble(self.engine, chooser, self.decoding, span=span, turns=self.config.turns, models=self.models)
