"""A step of reinforcement learning, ours against TRL's ``GRPOTrainer``: reward against seconds.

Same weights (a decoder without experts, in transformers' class on their side), same prompts' ids,
group size, reward, optimizer, rate and objective (GRPO's clip, advantages over the deviation, no
KL term, the mean over tokens), float32, the same number of threads. The toy task pays the share of
even token ids in an answer. Each side is a process of its own; they take turns, a block of steps at
a time, so that a slow minute of the machine falls on both alike. Start-up and the first step count
nowhere.

TRL wants an environment of its own (its dependencies would move ours):

    uv venv --python 3.11 runs/trl
    uv pip install --python runs/trl/bin/python torch==2.13.0 transformers==5.23.0 trl==1.16.0
    python benchmarks/rl_step.py --trl runs/trl/bin/python     # 2 minutes on 2 cores
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turns import Gate, Side, tell

SEED = 0
NUM_PROMPTS, GROUP_SIZE = 8, 8
LEARNING_RATE = 1e-2
CLIP = 0.2
SHAPE: dict[str, Any] = {
    "num_layers": 2, "num_dense_layers": 2, "model_width": 64, "dense_width": 128,
    "num_experts": 2, "top_k": 1, "num_shared_experts": 1, "expert_width": 8, "routed_scale": 1.0,
    "num_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_width": 16,
    "qk_rope_width": 8, "v_width": 16, "max_positions": 256,
}  # fmt: skip


def even_share(token_ids: Sequence[int]) -> float:
    """The reward: the share of even ids."""
    return sum(i % 2 == 0 for i in token_ids) / max(1, len(token_ids))


# Our side


def our_model() -> Any:
    """The same weights at every call."""
    import torch

    from moonlit.chat.tokenizer import Tokenizer
    from moonlit.models.kimi import Kimi
    from moonlit.models.shapes import DecoderShape, EncoderShape

    ids = Tokenizer.embedded()
    torch.manual_seed(SEED)
    encoder = EncoderShape(
        num_layers=1, width=16, mlp_width=16, num_heads=2, table_height=4, table_width=4
    )  # all is text: it is there because transformers' class wants one
    shape = DecoderShape(vocab_size=ids.vocab_size, media_pad_id=ids.special.media_pad_id, **SHAPE)
    return Kimi(decoder=shape, vision=encoder)


def our_text_model() -> Any:
    """The same weights without the encoder: both sides train the decoder alone."""
    from moonlit.models.kimi import Kimi

    whole = our_model()
    model = Kimi(decoder=whole.decoder_shape, vision=None)
    model.language_model.load_state_dict(whole.language_model.state_dict())
    return model


def hand_over(folder: Path) -> None:
    """Write our weights as transformers' class reads them, and the prompts' ids."""
    from moonlit.chat.template import render
    from moonlit.chat.tokenizer import Tokenizer

    sys.path.append(str(Path(__file__).parents[1] / "tests" / "models"))
    from oracle import oracle_of
    from transformers import DeepseekV3ForCausalLM

    oracle = oracle_of(our_model()).eval()
    text = DeepseekV3ForCausalLM(oracle.config.text_config)
    text.model.load_state_dict(oracle.model.language_model.state_dict())
    text.lm_head.load_state_dict(oracle.lm_head.state_dict())
    text.save_pretrained(folder)
    ids = Tokenizer.embedded()
    prompts = [
        render(task_of(number).prompt, ids, add_generation_prompt=True, thinking=False).input_ids
        for number in range(1000)
    ]
    said = {"prompts": prompts, "end": ids.special.im_end_id, "vocab_size": ids.vocab_size}
    (folder / "prompts.json").write_text(json.dumps(said))


def task_of(number: int) -> Any:
    """Prompts of one length."""
    from moonlit.batch import Task
    from moonlit.chat.messages import Message

    prompt = [Message(role="user", content=f" {number % 10} {number // 10 % 10}")]
    return Task(prompt=prompt, domain="reasoning", environment="even", answer=number)


def run_ours(args: argparse.Namespace) -> None:
    """Train with ours, as the turns allow."""
    from functools import partial

    from timed_phase import train

    from moonlit.losses.policy_gradient import grpo_loss
    from moonlit.rl.dialogue_environment import DialogueEnvironment
    from moonlit.rl.rollout_settings import RolloutSettings

    class EvenIds:
        async def judge(self, task: Any, trajectory: Any) -> dict[str, float]:
            (row,) = trajectory.segments
            ids = zip(row.input_ids, row.is_sampled, strict=True)
            return {"even": even_share([i for i, sampled in ids if sampled])}

    train(
        build_model=our_text_model,
        task_of=lambda number: task_of(number % 1000),
        environment=DialogueEnvironment(judge=EvenIds()),
        objective=partial(grpo_loss, clip_low=CLIP, clip_high=CLIP),
        normalise_advantages=True,
        learning_rate=LEARNING_RATE,
        rollouts=RolloutSettings(
            group_size=GROUP_SIZE, groups_per_iteration=NUM_PROMPTS, max_new_tokens=args.new_tokens
        ),
        told=lambda _, logged: {"reward": logged["rl/reward_mean"]},
        num_steps=args.steps,
        num_threads=args.threads,
        seed=SEED,
    )


# TRL's side


def run_trl(args: argparse.Namespace) -> None:
    """Train with TRL, as the gate allows; runs where moonlit is not installed."""
    import datasets
    import torch
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.set_num_threads(args.threads)
    said = json.loads((args.out / "prompts.json").read_text())
    vocabulary = {f"t{i}": i for i in range(said["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = f"t{said['end']}"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=end, pad_token="t0", padding_side="left"
    )
    rows = [{"prompt": " ".join(f"t{i}" for i in ids)} for ids in said["prompts"]]
    gate, earned = Gate(), []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = [even_share(ids) for ids in completion_ids]
        earned.append(statistics.mean(rewards))
        return rewards

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.end_step(reward=earned[-1])

    trainer = trl.GRPOTrainer(
        model=transformers.DeepseekV3ForCausalLM.from_pretrained(
            args.out, dtype=torch.float32
        ),
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        args=trl.GRPOConfig(
            output_dir=str(args.out / "trl"),
            per_device_train_batch_size=NUM_PROMPTS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=args.new_tokens,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, beta=0.0, epsilon=CLIP, loss_type="dapo", scale_rewards="group",
            temperature=1.0, top_p=1.0, top_k=0, max_steps=args.steps, seed=SEED,
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        ),
        callbacks=[Watch()],
    )  # fmt: skip
    tell({"torch": torch.__version__, "transformers": transformers.__version__,
          "trl": trl.__version__})  # fmt: skip
    trainer.train()


def row(side: Side) -> str:
    """Write a side's line of the table."""
    seconds = [step["seconds"] for step in side.steps[1:]]
    rate = NUM_PROMPTS * GROUP_SIZE / statistics.median(seconds)
    cells = [
        side.name,
        f"{statistics.median(seconds):.3f}",
        f"{min(seconds):.3f} - {max(seconds):.3f}",
        f"{rate:.0f}",
        *(reached(side, reward) for reward in (0.8, 0.95)),
        f"{statistics.mean(step['reward'] for step in side.steps[-5:]):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def reached(side: Side, reward: float) -> str:
    """Say when a mean reward was reached: seconds after the first step, and which step."""
    spent_s = 0.0
    for number, step in enumerate(side.steps[1:], start=2):
        spent_s += step["seconds"]
        if step["reward"] >= reward:
            return f"{spent_s:.1f} s, step {number}"
    return "not reached"


def main() -> None:
    """Let both sides take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block", type=int, default=5, help="steps that a side takes in a row")
    parser.add_argument("--new-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["ours", "TRL"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/rl_step"))
    args = parser.parse_args()
    if args.side:
        (run_ours if args.side == "ours" else run_trl)(args)
        return
    if not args.trl:
        parser.error("--trl: want the Python of an environment with TRL; see the top of this file")
    args.out.mkdir(parents=True, exist_ok=True)
    hand_over(args.out)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items()
             if name in ("steps", "threads", "new_tokens", "out")]  # fmt: skip
    sides = [
        Side("ours", sys.executable, __file__, words, args.out / "ours.log"),
        Side("TRL", args.trl, __file__, words, args.out / "trl.log"),
    ]
    loads = []
    for _ in range(args.steps // args.block):
        for side in sides:
            side.block(args.block)
        loads.append(os.getloadavg()[0])
    for side in sides:
        print(f"{side.name}: {side.versions}")
    print(
        f"{platform.machine()}, {args.threads} threads, load {min(loads):.1f} to {max(loads):.1f}"
    )
    print(f"{NUM_PROMPTS} x {GROUP_SIZE} answers of {args.new_tokens} tokens a step")
    print("\n| side | median s a step | min - max s | completions/s | reward 0.8 | reward 0.95"
          " | last five steps |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side in sides:
        print(row(side))
    ours, theirs = (statistics.median(s["seconds"] for s in side.steps[1:]) for side in sides)
    print(f"\nours takes {theirs / ours:.2f} times as many steps a second")
    for side in sides:
        print(side.name, [round(step["reward"], 3) for step in side.steps])


if __name__ == "__main__":
    main()
