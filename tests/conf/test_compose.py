"""Every experiment in conf/ composes, resolves, and can be built."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from moonlit.agents.swarm.subagent import PolicySubAgent
from moonlit.chat.tokenizer import Tokenizer
from moonlit.parts import made
from moonlit.train import build, resume_command

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = [None, *sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))]
PHASES = sorted(p.stem for p in (CONF / "phase").glob("*.yaml"))
MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))
OPTION_FILES = sorted(p for p in CONF.rglob("*.yaml"))
SCALARS_ALLOWED_UPWARD = {"seed", "run_dir", "tokenizer"}


def compose_run(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_with_nothing_missing(experiment: str | None):
    cfg = compose_run(*([f"experiment={experiment}"] if experiment else []))
    OmegaConf.resolve(cfg)
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("phase", ["visual_rl", "joint_rl"])
def test_held_out_pictures_are_what_their_sets_are_called_and_all_that_is_trained(phase: str):
    tasks = made(compose_run(f"phase={phase}").data)

    def asked(name: str, *, held_out: bool) -> set[str]:
        some = tasks.tasks(name, 40, held_out=held_out, first=0)
        return {task.environment for task in some}

    assert {"colours", "shapes"} <= set(tasks.held_out_names)
    assert asked("colours", held_out=True) == {"colour"}
    assert asked("shapes", held_out=True) == {"shape"}
    trained = asked("attributes", held_out=False)
    assert trained == asked("attributes", held_out=True) == {"colour", "shape"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_part_of_an_experiment_can_be_built(experiment: str | None, tmp_path: Path):
    chosen = [f"experiment={experiment}"] if experiment else []
    run = build(compose_run(*chosen, "debug=one_step", f"run_dir={tmp_path}"))
    assert run.trainer.max_steps == 1


@pytest.mark.parametrize("phase", PHASES)
def test_every_part_of_a_phase_can_be_built(phase: str, tmp_path: Path):
    run = build(compose_run(f"phase={phase}", "debug=one_step", f"run_dir={tmp_path}"))
    assert run.trainer.max_steps == 1
    assert len(run.callbacks) > 5


@pytest.mark.parametrize(
    "environment",
    [
        "rules",
        "rules_ipython",
        "swarm_facts",
        "swarm_search",
        "swarm_search_ipython",
        "swarm_tables",
    ],
)
def test_an_environment_is_swapped_by_name(environment: str, tmp_path: Path):
    chosen = f"environment@phase.environment={environment}"
    run = build(compose_run("phase=visual_rl", chosen, f"run_dir={tmp_path}"))
    assert callable(run.phase.environment.run)


@pytest.mark.parametrize(
    "chosen",
    [
        ["rewards@phase.environment.judge=format"],
        ["ptx@data.ptx=dialogues", "phase.ptx_coef=0.1"],
        ["+phase.environment.caps.tokens.counting=8", "phase.environment.caps.penalty=0.5"],
        ["+phase.rollouts.final_temperature=0.5", "phase.reset_optimizer=true"],
        ["+context@phase.rollouts.context=summary"],
        ["task_order@phase.task_order=prioritised"],
        ["task_order@phase.task_order=curriculum"],
        ["length_rule@phase.length_rule=length_reward"],
        ["length_rule@phase.length_rule=shuffled"],
        ["length_rule@phase.length_rule=hard_cap", "phase.length_rule.max_tokens=8"],
    ],
)
def test_options_of_reinforcement_learning_compose(chosen: list[str], tmp_path: Path):
    run = build(compose_run("phase=joint_rl", *chosen, f"run_dir={tmp_path}"))
    assert callable(run.phase.environment.run)


@pytest.mark.parametrize("path", sorted((CONF / "context").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_context_strategy_is_chosen_by_name(path: Path, tmp_path: Path):
    chosen = f"context@phase.rollouts.context={path.stem}"
    run = build(compose_run("phase=parl", chosen, f"run_dir={tmp_path}"))
    strategy = run.phase.rollouts.context
    words = path.stem.title().replace("_", "").replace("None", "KeepAll")
    assert type(strategy).__name__ == words


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is looked at before a checkpoint's weights are read."""
    ids, path = Tokenizer.embedded(), tmp_path_factory.mktemp("ckpt") / "a.ckpt"
    decoder = {"vocab_size": ids.vocab_size, "media_pad_id": ids.special.media_pad_id}
    torch.save({"shapes": {"decoder": decoder, "vision": None}}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "ckpts", "steps"),
    [
        ("frozen", ["policy.ckpt"], None),
        (
            "small_then_large",
            ["stages.small.worker.policy.ckpt", "stages.large.worker.policy.ckpt"],
            [0, 100],
        ),
    ],
)
def test_a_frozen_sub_agent_is_a_kind_of_its_own(kind, ckpts, steps, ckpt: Path, tmp_path: Path):
    solver = "phase.environment.workers.solver"
    chosen = [
        "phase=parl", "data=fact_search", "environment@phase.environment=swarm_search",
        f"+subagent@{solver}={kind}", f"run_dir={tmp_path}",
        *(f"{solver}.{key}={ckpt}" for key in ckpts),
        "phase.environment.limits.max_depth=2",
    ]  # fmt: skip
    environment = build(compose_run(*chosen)).phase.environment
    assert environment.limits.max_depth == 2
    workers = environment.workers
    assert list(workers) == ["reader", "searcher", "solver"]
    stages = getattr(workers["solver"], "stages", None)
    assert (stages and [stage.from_step for stage in stages]) == steps


@pytest.mark.parametrize(
    ("kind", "ckpts"),
    [
        ("row_policy", ["policy.ckpt"]),
        (
            "row_policy_small_then_large",
            ["stages.small.worker.policy.ckpt", "stages.large.worker.policy.ckpt"],
        ),
    ],
)
def test_a_checkpoint_takes_the_place_of_scripted_sub_agents(
    kind, ckpts, ckpt: Path, tmp_path: Path
):
    worker = "phase.environment.workers.worker"
    chosen = [f"subagent@{worker}={kind}", *(f"{worker}.{key}={ckpt}" for key in ckpts)]
    run = build(compose_run("experiment=parl_facts", *chosen, f"run_dir={tmp_path}"))
    (now,) = run.phase.environment.workers_now().values()
    assert isinstance(now, PolicySubAgent)


JUDGES = {
    "endpoint": ["model.base_url=http://127.0.0.1:9/v1", "model.model=referee"],
    "frozen": ["model.ckpt={ckpt}"],
}


@pytest.mark.parametrize("judge", JUDGES)
def test_a_group_judge_is_chosen_by_name(
    judge: str, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JUDGE_API_KEY", "any")
    settings = [f"phase.group_judge.{setting.format(ckpt=ckpt)}" for setting in JUDGES[judge]]
    run = build(
        compose_run(
            "phase=joint_rl", f"judge@phase.group_judge={judge}", f"run_dir={tmp_path}", *settings
        )
    )
    assert len(run.phase.group_judge.rubrics["default"]) > 1
    assert build(compose_run("phase=joint_rl", f"run_dir={tmp_path}")).phase.group_judge is None


def test_a_judges_endpoint_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    settings = [f"phase.group_judge.{setting}" for setting in JUDGES["endpoint"]]
    with pytest.raises(Exception, match="has no key: the environment variable JUDGE_API_KEY"):
        build(
            compose_run(
                "phase=joint_rl", "judge@phase.group_judge=endpoint", f"run_dir={tmp_path}",
                *settings,
            )
        )  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_built_on_the_meta_device(model: str):
    with torch.device("meta"):
        built = made(compose_run(f"model={model}").model)()
    assert all(p.is_meta for p in built.parameters())


def test_debug_wins_last():
    assert compose_run("debug=one_step").trainer.max_steps == 1


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_interpolations_only_point_up_to_run_level_scalars(path: Path):
    names = set(re.findall(r"\$\{([^}:]+)\}", path.read_text()))
    assert names <= SCALARS_ALLOWED_UPWARD


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_option_files_stay_short(path: Path):
    assert len(path.read_text().splitlines()) <= 60


def test_an_unknown_key_is_refused():
    cfg = compose_run("+data.batchsize=3")
    with pytest.raises(Exception, match="batchsize"):
        made(cfg.data)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("resume_from=missing.ckpt", "resume_from=missing.ckpt"),
        ("init_from=missing.ckpt", "init_from=missing.ckpt"),
        ("model=moonlight_16b_a3b", "2304 ids, but the model's vocab_size is 163840"),
        ("model.decoder.media_pad_id=2070", "media_pad_id=2070"),
        ("tokenizer=no/such/folder", "no/such/folder"),
        ("model.attention=flash", "flash"),
        ("model.experts=magic", "magic"),
        ("data.vision_share=1.5", "vision_share=1.5"),
        ("phase.guard.window=0", "window"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_made(
    override: str, named: str, tmp_path: Path
):
    with pytest.raises(Exception, match=re.escape(named)):
        build(compose_run(override, f"run_dir={tmp_path}/run", f"data.data_dir={tmp_path}/data"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key", ["data.row_tokens", "model.decoder.hidden_size", "phase.max_grad_norm"]
)
def test_a_value_of_the_wrong_type_is_refused_by_name(key: str, tmp_path: Path):
    with pytest.raises(Exception, match=key.split(".")[-1]):
        build(compose_run(f"{key}=two", f"run_dir={tmp_path}"))


def test_a_stopped_run_goes_on_with_its_own_words(monkeypatch: pytest.MonkeyPatch):
    """Catches: a resume that falls back to the default model, length or folder."""
    words = ["model=small", "phase.trains=[mm_projector]", "init_from=a.ckpt"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train", overrides=words, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)

    command = resume_command("runs/mine", Path("runs/mine/checkpoints/step_000003.ckpt"))

    assert command == (
        "moonlit train model=small 'phase.trains=[mm_projector]' run_dir=runs/mine "
        "resume_from=runs/mine/checkpoints/step_000003.ckpt"
    )


@pytest.mark.parametrize("phase", PHASES)
def test_one_step_is_long_enough_for_every_schedule(phase: str):
    """Catches: a warm-up or a decay in steps, which a run of one step has no room for."""
    cfg = compose_run(f"phase={phase}", "debug=one_step")
    schedule = made(cfg.optim)["schedule"]
    assert schedule(0, cfg.trainer.max_steps) == pytest.approx(1.0, abs=0.9)


def test_what_conf_says_is_handed_on_as_plain_containers(monkeypatch: pytest.MonkeyPatch):
    """Catches: a request to a judge that no JSON encoder takes."""
    monkeypatch.setenv("JUDGE_API_KEY", "a key")
    where = ["base_url=http://127.0.0.1:9/v1", "model=m", "body={response_format: {type: text}}"]
    words = [f"phase.group_judge.model.{word}" for word in where]
    cfg = compose_run("phase=joint_rl", "judge@phase.group_judge=endpoint", *words)
    endpoint = made(cfg.phase.group_judge.model)
    assert json.loads(json.dumps(endpoint.body))["response_format"] == {"type": "text"}
