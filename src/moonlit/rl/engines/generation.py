"""One request on its way to a completion."""

from dataclasses import dataclass, field

from moonlit.models.cache import CachedSequence
from moonlit.rl.engines.base import Completion, Request
from moonlit.rl.engines.prompt import Prompt, Session


@dataclass(slots=True, eq=False)
class Generation:
    """A request, what was sampled for it, and where its latents are."""

    request: Request
    max_positions: int
    media_pad_id: int
    completion: Completion = field(default_factory=Completion)
    sequence: CachedSequence = field(default_factory=CachedSequence)
    ids: list[int] = field(init=False)
    """The prompt and what was sampled."""
    prompt: Prompt = field(init=False)
    """What must be computed before the next token: ``ids`` when it began to wait."""
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.request.input_ids)
        self.wait()

    @property
    def session(self) -> Session | None:
        """The dialogue it belongs to."""
        return self.request.session

    def as_prompt(self) -> Prompt:
        """All tokens so far."""
        return Prompt(list(self.ids), self.request.media, self.media_pad_id)

    def wait(self) -> None:
        """Take all tokens so far as the prompt."""
        self.prompt = self.as_prompt()

    def take(self, token_id: int, behavior: float, untempered: float, version: int) -> bool:
        """Record a sampled token; return whether it was the last."""
        completion, sampling = self.completion, self.request.sampling
        self.ids.append(token_id)
        completion.token_ids.append(token_id)
        completion.behavior_logprobs.append(behavior)
        completion.untempered_logprobs.append(untempered)
        completion.policy_versions.append(version)
        if token_id in sampling.stop_ids:
            completion.stop_reason = "stop"
        elif len(completion.token_ids) == sampling.max_new_tokens:
            completion.stop_reason = "length"
        elif len(self.ids) == self.max_positions:
            completion.stop_reason = "context"
        else:
            return False
        return True
