"""Continuous batching: sequences join and leave between any two steps.

A step admits waiting requests while there is room, computes their prompts packed end to end, then
gives every running sequence one more token. Knows no asyncio; to be used by one thread at a time.

Source: Orca (OSDI 2022), iteration-level scheduling.

Axes: B sequences, V vocabulary.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from moonlit.models.cache import CachedSequence, CacheFullError
from moonlit.rl.engines.generation import Generation
from moonlit.rl.engines.prompt import Prompt, Session, SharedPrompt
from moonlit.rl.engines.runner import Runner
from moonlit.rl.engines.sampling import BatchSampling, sample, uniforms

One = TypeVar("One")


@dataclass(slots=True, eq=False)
class Prefill:
    """A prompt to be computed, from what its sequence holds already, and who waits for it."""

    prompt: Prompt
    sequence: CachedSequence
    generations: list[Generation]
    past: int = field(init=False)
    """Tokens that need no computing."""

    def __post_init__(self) -> None:
        self.past = self.sequence.length


class ContinuousBatch:
    """The running sequences of one model, and those waiting.

    Args:
        runner: the model and its cache.
        always_banned: ids that nobody may sample.
        max_sequences: that run at the same time.
        max_prefill_tokens: of prompts computed in one row; a longer prompt has a row of its own.
        version: of the model's weights.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        always_banned: frozenset[int],
        max_sequences: int,
        max_prefill_tokens: int,
        version: int,
    ) -> None:
        self.runner, self.cache = runner, runner.cache
        self.always_banned, self.version = always_banned, version
        self.max_sequences, self.max_prefill_tokens = max_sequences, max_prefill_tokens
        self.waiting: deque[Generation] = deque()
        self.num_waiting_for: Counter[bytes] = Counter()  # by the prompt's key
        self.running: list[Generation] = []
        self.shared: dict[bytes, SharedPrompt] = {}  # by key, while somebody waits for it
        self.idle_sessions: dict[int, Session] = {}  # those with latents, longest idle first
        self.settings: BatchSampling | None = None  # of the running; None: they changed
        self.finished: list[Generation] = []
        self.num_sampled_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Advance everybody by one token; return those that ended, well or not."""
        self.admit()
        self.make_room()
        self.isolate(self.running, self.decode, self.fail)
        finished, self.finished = self.finished, []
        return finished

    # Joining

    def enqueue(self, generation: Generation, *, first: bool = False) -> None:
        """Let a generation wait for its turn."""
        generation.wait()
        self.num_waiting_for[generation.prompt.key] += 1
        (self.waiting.appendleft if first else self.waiting.append)(generation)

    def dequeue(self, generation: Generation) -> None:
        """Take a generation out of those waiting; drop its prompt if it was the last to want it."""
        self.waiting.remove(generation)
        key = generation.prompt.key
        self.num_waiting_for[key] -= 1
        if not self.num_waiting_for[key]:
            del self.num_waiting_for[key]

    def admit(self) -> None:
        """Let waiting requests join; equal prompts are computed once."""
        fresh: dict[bytes, Prefill] = {}
        continued: list[Prefill] = []
        num_joining = num_tokens = num_pages = 0
        while self.waiting and len(self.running) + num_joining < self.max_sequences:
            generation = self.waiting[0]
            prompt, key = generation.prompt, generation.prompt.key
            if key not in self.shared and key not in fresh:
                if num_tokens and num_tokens + len(prompt.ids) > self.max_prefill_tokens:
                    break
                num_tokens += len(prompt.ids)
                num_pages += -(-len(prompt.ids) // self.cache.page_tokens)
            # Besides the prompts, everybody may need a page for the next token.
            if not self.free_pages(num_pages + len(self.running) + 2 * (num_joining + 1)) and (
                self.running or num_joining
            ):
                break
            self.dequeue(generation)
            num_joining += 1
            if key in self.shared:
                self.start([generation], [self.shared[key]])
            elif key in fresh:
                fresh[key].generations.append(generation)
            elif (sequence := self.latents_of_session(generation)) is not None:
                continued.append(Prefill(prompt, sequence, [generation]))
            else:
                fresh[key] = Prefill(prompt, CachedSequence(), [generation])
        # Apart: a row in which nobody has a past attends with the training kernel.
        self.isolate(list(fresh.values()), self.prefill, self.fail_prefill)
        self.isolate(continued, self.prefill, self.fail_prefill)
        self.drop_shared([key for key in self.shared if key not in self.num_waiting_for])

    def prefill(self, jobs: Sequence[Prefill]) -> None:
        """Compute prompts in one row; everybody who waits for one starts."""
        for job in jobs:
            self.cache.truncate(job.sequence, job.past)  # a failed attempt may have got further
        logits = self.runner.next_logits(
            [job.sequence for job in jobs],
            [job.prompt.ids[job.past :] for job in jobs],
            self.runner.features([(job.prompt, job.past) for job in jobs]),
        )
        starting, starts = [], []
        for job, logits_V in zip(jobs, logits, strict=True):
            shared = self.shared[job.prompt.key] = SharedPrompt(job.sequence, logits_V)
            starting += job.generations
            starts += [shared] * len(job.generations)
            computed = len(job.prompt.ids) - job.past
            first = job.generations[0].completion
            first.num_prefilled_tokens += computed
            first.num_reused_tokens -= computed  # start() counts the whole prompt as reused
        self.start(starting, starts)

    def start(self, generations: Sequence[Generation], starts: Sequence[SharedPrompt]) -> None:
        """Let generations go on from computed prompts: sample the first token of each."""
        for generation, shared in zip(generations, starts, strict=True):
            generation.sequence = self.cache.fork(shared.sequence)
            generation.completion.num_reused_tokens += shared.sequence.length
        self.running += generations
        self.settings = None
        self.record(generations, torch.stack([shared.next_logits_V for shared in starts]))

    def latents_of_session(self, generation: Generation) -> CachedSequence | None:
        """Return the latents of what a prompt has in common with its session; None: nothing."""
        session = generation.session
        if session is None or session.sequence is None or session.prompt is None:
            return None
        sequence = self.take_latents(session)
        # The last token is computed in any case: its output is what is sampled from.
        common = min(session.prompt.num_common(generation.prompt), len(generation.prompt.ids) - 1)
        self.cache.truncate(sequence, common)
        return sequence if sequence.length else None

    def take_latents(self, session: Session) -> CachedSequence:
        """Take an idle session's latents from it."""
        sequence, session.sequence = session.sequence, None
        del self.idle_sessions[id(session)]
        return sequence or CachedSequence()

    # Running

    def decode(self, running: Sequence[Generation]) -> None:
        """Give each its next token."""
        for generation in running:
            # The last sampled token is still to be computed; a failed attempt may have done so.
            self.cache.truncate(generation.sequence, len(generation.ids) - 1)
        logits = self.runner.next_logits(
            [generation.sequence for generation in running],
            [generation.ids[-1:] for generation in running],
        )
        self.record(running, logits)

    def record(self, generations: Sequence[Generation], logits: Float[Tensor, "B V"]) -> None:
        """Draw and record the next token of each; those that are done leave."""
        numbers = uniforms(
            [generation.request.seed for generation in generations],
            [len(generation.ids) for generation in generations],
        )
        sampled = sample(logits, self.settings_of(generations), numbers.to(logits.device))
        rows = zip(
            generations,
            sampled.token_ids_B.tolist(),
            sampled.behavior_logprobs_B.tolist(),
            sampled.untempered_logprobs_B.tolist(),
            strict=True,
        )
        for generation, token_id, behavior, untempered in rows:
            self.num_sampled_tokens += 1
            if not untempered > -torch.inf or not behavior > -torch.inf:  # nan included
                place = len(generation.ids)
                error = FloatingPointError(f"the logits at position {place} are not finite")
                self.fail(generation, error)
            elif generation.take(token_id, behavior, untempered, self.version):
                self.leave(generation)

    def settings_of(self, generations: Sequence[Generation]) -> BatchSampling:
        """Return the sampling settings as tensors; those of the running are kept."""
        if len(generations) == len(self.running) and self.settings is not None:
            return self.settings
        settings = BatchSampling.of(
            [generation.request.sampling for generation in generations],
            self.always_banned,
            self.runner.device,
        )
        self.settings = settings if len(generations) == len(self.running) else None
        return settings

    def isolate(
        self,
        some: Sequence[One],
        run: Callable[[Sequence[One]], None],
        fail: Callable[[One, Exception], None],
    ) -> None:
        """Run all at once; where that fails, one by one, so that only the culprit fails."""
        some = list(some)
        try:
            if some:
                run(some)
        except Exception as error:
            if len(some) == 1:
                fail(some[0], error)
            else:
                for one in some:
                    self.isolate([one], run, fail)

    # Leaving

    def leave(self, generation: Generation) -> None:
        """Take a running generation out; its latents stay if a session wants them."""
        self.running.remove(generation)
        self.settings = None
        self.finished.append(generation)
        session = generation.session
        if session is None or session.is_closed or generation.error is not None:
            self.cache.release(generation.sequence)
        else:
            self.forget(session)
            session.prompt, session.sequence = generation.as_prompt(), generation.sequence
            self.idle_sessions[id(session)] = session

    def fail(self, generation: Generation, error: Exception) -> None:
        """End a running generation with an error."""
        generation.error = error
        self.leave(generation)

    def fail_prefill(self, job: Prefill, error: Exception) -> None:
        """End everybody who waited for a prompt that cannot be computed."""
        self.cache.release(job.sequence)
        for generation in job.generations:
            if isinstance(error, CacheFullError) and self.running:
                self.enqueue(generation, first=True)  # there will be room
                continue
            generation.error = error
            self.finished.append(generation)

    def cancel(self, generation: Generation) -> None:
        """Forget a generation that nobody waits for any more."""
        if generation in self.waiting:
            self.dequeue(generation)
            self.drop_shared([key for key in self.shared if key not in self.num_waiting_for])
        elif generation in self.running:
            self.running.remove(generation)
            self.settings = None
            self.cache.release(generation.sequence)

    def forget(self, session: Session) -> None:
        """Drop an idle session's latents."""
        if session.sequence is not None:
            self.cache.release(self.take_latents(session))

    # Room

    def make_room(self) -> None:
        """Free pages for everybody's next token; the last to come waits again if there are none."""
        if self.cache.max_pages is None:
            return
        while not self.free_pages(
            sum(self.cache.num_new_pages(generation.sequence, 1) for generation in self.running)
        ):
            self.interrupt(self.running[-1])

    def free_pages(self, needed: int) -> bool:
        """Return whether so many pages can be taken; idle sessions and prompts give theirs up."""
        while self.cache.num_pages_left is not None and self.cache.num_pages_left < needed:
            if self.idle_sessions:
                self.forget(next(iter(self.idle_sessions.values())))
            elif self.shared:
                self.drop_shared(list(self.shared))
            else:
                return False
        return True

    def interrupt(self, generation: Generation) -> None:
        """Drop a running generation's latents; it goes on later, from the same tokens."""
        self.running.remove(generation)
        self.settings = None
        self.cache.release(generation.sequence)
        self.enqueue(generation, first=True)

    def drop_shared(self, keys: Sequence[bytes]) -> None:
        """Forget computed prompts."""
        for key in keys:
            self.cache.release(self.shared.pop(key).sequence)

    def change_weights(self, version: int) -> None:
        """Forget everything that older weights computed; who was running goes on with the new."""
        for session in list(self.idle_sessions.values()):
            self.forget(session)
        self.drop_shared(list(self.shared))
        for generation in reversed(self.running[:]):
            self.interrupt(generation)
        self.version = version
