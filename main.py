"""Runs an experiment.

    python main.py --fdl_config=configs.gpt.Quickstart --job_log_dir=DIR
        [--mode=train|eval|decode|plan|replay|check|check_cluster]

Flags become a config, the config an Experiment, and that trains, evaluates, decodes, takes a recorded step again, or is
planned for hardware that is not here. `--fdl_help` explains a config.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import sys
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

from absl import flags as absl_flags
from absl import logging  # noqa: F401  (defines --alsologtostderr and --verbosity)

from configs import flags

JOB_LOG_DIR = absl_flags.DEFINE_string(
    "job_log_dir", None, "Folder for everything that the run writes."
)
MODE = absl_flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "decode", "plan", "replay", "check", "check_cluster"],
    "What to do; check: only says whether the config is right and fits the devices; check_cluster: "
    "whether its processes can start.",
)
EVAL_ON_TEST = absl_flags.DEFINE_boolean(
    "eval_on_test", None, "train: evaluate the held-out sets while training."
)
FOLLOW = absl_flags.DEFINE_boolean(
    "follow",
    False,
    "eval: the newest checkpoint, whenever there is a new one, until the run has finished.",
)
CHECKPOINT_STEP = absl_flags.DEFINE_integer(
    "checkpoint_step", None, "eval, decode: step of the checkpoint, the latest by default."
)
CHECKPOINT = absl_flags.DEFINE_string(
    "checkpoint",
    None,
    "eval, decode: another run or checkpoint to read, in place of --job_log_dir's own.",
)
PROMPT = absl_flags.DEFINE_multi_string("prompt", [], "decode: a prompt; may be repeated.")
PROMPT_FILE = absl_flags.DEFINE_string(
    "prompt_file", None, "decode: prompts, .txt (one a line) or .jsonl."
)
REPLAY_STEP = absl_flags.DEFINE_integer(
    "replay_step", None, "replay: the step to look at, the newest recorded spike by default."
)
CHIP = absl_flags.DEFINE_string(
    "chip", None, "plan: h100 (the default), a100, v5p, v5e, v6e, or cpu: virtual devices."
)
DEVICES = absl_flags.DEFINE_integer(
    "devices", None, "plan, check: how many chips, where the mesh does not say it."
)
SEARCH = absl_flags.DEFINE_boolean(
    "search", False, "plan: look for the fastest mesh, microbatches and remat policy that fit."
)
SEARCH_COMPILES = absl_flags.DEFINE_integer(
    "search_compiles", None, "plan --search: candidates that are compiled at most, 8 by default."
)
PLAN_TOKENS = absl_flags.DEFINE_float(
    "plan_tokens", None, "plan: tokens to train on: how long that takes, as 300e9."
)
PLAN_GPU_HOURS = absl_flags.DEFINE_float(
    "plan_gpu_hours", None, "plan: a budget of device hours: how many tokens that gives."
)
PLAN_PICTURE = absl_flags.DEFINE_string(
    "plan_picture", None, "plan: file for a picture of which device holds what."
)
TFDS_DATA_DIR = absl_flags.DEFINE_string(
    "tfds_data_dir", None, "Folder of TFDS data sets (the knob TFDS_DATA_DIR)."
)
MULTIPROCESS = absl_flags.DEFINE_boolean(
    "multiprocess_gpu",
    None,
    "Join a run of several processes; by default where srun, mpirun or a JobSet started several.",
)
SERVER_ADDR = absl_flags.DEFINE_string(
    "server_addr", None, "multiprocess: host:port of process 0; found by itself under Slurm."
)
NUM_HOSTS = absl_flags.DEFINE_integer("num_hosts", None, "multiprocess: number of processes.")
HOST_IDX = absl_flags.DEFINE_integer(
    "host_idx", None, "multiprocess: number of this process, from 0."
)
COMPILATION_CACHE = absl_flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/paxlike/xla",
    "Folder of compiled programs, kept from run to run; empty for none.",
)


def main(argv: list[str]) -> int:
    """Returns the exit code of the process."""
    request, rest = flags.split(argv)
    flags.parse_absl(rest)
    if EVAL_ON_TEST.value is not None:
        request, _ = flags.split([*argv, f"--fdl.EVAL_ON_TEST={EVAL_ON_TEST.value}"])
    if request.list:
        print(flags.list_configs())
        return 0
    if request.help:
        print(flags.help_page(request, os.environ, color=sys.stdout.isatty()))
        return 0
    if not (request.config or request.config_file):
        flags.resolve(request)  # says how to name one
    for name in ("job_log_dir", "checkpoint", "prompt_file"):
        if absl_flags.FLAGS[name].value == "":
            raise flags.UsageError(
                f"--{name}= is empty: leave it out, or set the variable that it was to come from"
            )
    _refuse_flags_without_effect()
    environ = dict(os.environ)
    if TFDS_DATA_DIR.value is not None:
        environ["TFDS_DATA_DIR"] = TFDS_DATA_DIR.value
    resolved = flags.resolve(request, environ)
    if JOB_LOG_DIR.value is None and MODE.value not in ("plan", "check"):
        raise flags.UsageError(
            "--job_log_dir=DIR is missing: the folder for checkpoints, logs and results"
        )
    for notice in resolved.notices:
        print(f"note: {notice}", file=sys.stderr)
    if getattr(resolved.tree, "deterministic", False):
        _make_deterministic()
    _set_xla_flags(resolved)
    if MODE.value == "plan":
        return _plan(argv, environ, resolved)
    if MODE.value == "check":
        return _check(resolved)
    return _run(resolved)


def _refuse_flags_without_effect() -> None:
    """A flag of another mode, or half of a pair, would be ignored: an error instead."""
    given = {
        "checkpoint": CHECKPOINT.value is not None,
        "checkpoint_step": CHECKPOINT_STEP.value is not None,
        "follow": FOLLOW.value,
        "prompt": bool(PROMPT.value),
        "prompt_file": PROMPT_FILE.value is not None,
        "replay_step": REPLAY_STEP.value is not None,
        "chip": CHIP.value is not None,
        "devices": DEVICES.value is not None,
        "search": SEARCH.value,
        "search_compiles": SEARCH_COMPILES.value is not None,
        "plan_tokens": PLAN_TOKENS.value is not None,
        "plan_gpu_hours": PLAN_GPU_HOURS.value is not None,
        "plan_picture": PLAN_PICTURE.value is not None,
    }
    serves = {
        "train": (),
        "eval": ("checkpoint", "checkpoint_step", "follow"),
        "decode": ("checkpoint", "checkpoint_step", "prompt", "prompt_file"),
        "replay": ("replay_step",),
        "check": ("devices",),
        "check_cluster": (),
        "plan": (
            "chip",
            "devices",
            "search",
            "search_compiles",
            "plan_tokens",
            "plan_gpu_hours",
            "plan_picture",
        ),
    }
    for name, is_given in given.items():
        if is_given and name not in serves[MODE.value]:
            hint = (
                "; to start from the weights of another run set --fdl.CHECKPOINT_RESTORE_PATH"
                if name == "checkpoint"
                else ""
            )
            raise flags.UsageError(f"--{name} has no effect with --mode={MODE.value}{hint}")
    if FOLLOW.value and CHECKPOINT_STEP.value is not None:
        raise flags.UsageError(
            "--follow evaluates the newest checkpoint: leave out --checkpoint_step"
        )
    if SEARCH_COMPILES.value is not None and not SEARCH.value:
        raise flags.UsageError("--search_compiles has no effect without --search")
    if PLAN_PICTURE.value is not None and SEARCH.value:
        raise flags.UsageError("--plan_picture shows one mesh: leave out --search")
    distributed = MULTIPROCESS.value or SERVER_ADDR.value is not None
    if MULTIPROCESS.value is False and SERVER_ADDR.value is not None:
        raise flags.UsageError("--server_addr has no effect with --nomultiprocess_gpu")
    if distributed and MODE.value in ("plan", "check"):
        raise flags.UsageError(
            f"--multiprocess_gpu and --server_addr have no effect with --mode={MODE.value}"
        )
    if not distributed and (NUM_HOSTS.value is not None or HOST_IDX.value is not None):
        raise flags.UsageError(
            "--num_hosts and --host_idx need --multiprocess_gpu and --server_addr=HOST:PORT of process 0"
        )


def _is_for_the_user(error: BaseException) -> bool:
    """Whether paxlike itself raised it; one out of a library below needs its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    here = os.path.dirname(os.path.abspath(__file__))
    folders = tuple(os.path.join(here, name) + os.sep for name in ("paxlike", "configs"))
    return not frames or frames[-1].filename.startswith((*folders, os.path.abspath(__file__)))


def _build(resolved):
    """The experiment of a resolved config."""
    import fiddle as fdl

    try:
        return fdl.build(resolved.tree)
    except ValueError as error:  # Fiddle adds a paragraph on where in the tree
        raise flags.UsageError(str(error).split("\n\nFiddle context")[0]) from error


def _run(resolved) -> int:
    """Alone, or as one of several processes, which watch each other and end together."""
    from paxlike.cluster import failure
    from paxlike.cluster.identity import process_start_time
    from paxlike.cluster.job import Job

    ends, notice = flags.job_end_time(os.environ)
    peers = _set_up_jax()
    job = Job(began=process_start_time(), ends=ends, peers=peers)
    text = f"{resolved.text}\n\n{notice}\n" if notice else resolved.text
    try:
        code = _do(resolved, text, job)
    except BaseException as error:
        if peers is None or isinstance(error, SystemExit):
            raise
        peers.report(error)
        peers.wait_for_the_end(failure.code_of(error))
        raise
    if peers is not None:
        peers.close()
    return code


def _out_of_memory(error: BaseException) -> str:
    """What to say where a device could not hold an array; empty for any other error."""
    if not isinstance(error, RuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    found = re.search(r"allocat\w*\s+(\d[\d.]*)\s?(\w+)", str(error))
    wanted = " left"
    if found:
        number, unit = found.groups()
        size = f"{float(number) / 2**30:,.2f} GiB" if unit == "bytes" else f"{number} {unit}"
        wanted = f" for {size}"
    return (
        f"a device has no memory{wanted}: --mode=plan with the same flags says what a step takes, and --search with it "
        "which mesh, microbatches and remat policy fit"
    )


def _describe(error: BaseException) -> str:
    """An error in one line, with the traceback where it is not paxlike's own."""
    if out_of_memory := _out_of_memory(error):
        return f"error: {out_of_memory}"
    known = isinstance(error, ValueError | OSError)
    text = f"error: {error}" if known else ""
    if not known or not _is_for_the_user(error):
        text = "".join(traceback.format_exception(error)) + text
    return text


def _do(resolved, text: str, job) -> int:
    experiment = _build(resolved)
    if MODE.value == "train":
        return experiment.train(JOB_LOG_DIR.value, config=resolved.json, config_text=text, job=job)
    if MODE.value == "check_cluster":
        return experiment.check_start(JOB_LOG_DIR.value, config=resolved.json, job=job)
    if MODE.value == "replay":
        return experiment.replay(JOB_LOG_DIR.value, step=REPLAY_STEP.value)
    source = {
        "checkpoint": CHECKPOINT.value or JOB_LOG_DIR.value,
        "step": CHECKPOINT_STEP.value,
        "config_text": text,
    }
    if MODE.value == "eval":
        return experiment.evaluate(JOB_LOG_DIR.value, follow=FOLLOW.value, **source)
    return experiment.decode(
        JOB_LOG_DIR.value, prompts=PROMPT.value, prompt_file=PROMPT_FILE.value, **source
    )


def _plan(argv: list[str], environ: dict[str, str], resolved) -> int:
    """Compiles the step for chips that are not here, and prints what it would take."""
    import jax

    from paxlike.plan import command

    # Plug-ins would look for their devices; the plan itself computes nothing.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", None)
    experiment = _build(resolved)

    def change(knobs: dict[str, str]):
        """The experiment with other values of some knobs."""
        more = [f"--fdl.{name}={value}" for name, value in knobs.items()]
        return _build(flags.resolve(flags.split([*argv, *more])[0], environ))

    options = command.Options(
        chip=CHIP.value or "h100",
        num_devices=DEVICES.value,
        num_tokens=PLAN_TOKENS.value,
        gpu_hours=PLAN_GPU_HOURS.value,
        directory=JOB_LOG_DIR.value,
        picture=PLAN_PICTURE.value,
        command=shlex.join(["python", "main.py", *argv[1:]]),
    )
    chip, num_devices = command.prepare(experiment, options, os.environ)
    if chip.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", num_devices)
    if SEARCH.value:
        limit = 8 if SEARCH_COMPILES.value is None else SEARCH_COMPILES.value
        policy = resolved.knobs.get("CHECKPOINT_POLICY")
        return command.search(experiment, change, options, policy=policy, max_compiles=limit)
    return command.plan(experiment, options)


def _check(resolved) -> int:
    """Prints the mesh and the batch of a config that is right and fits the devices, as JSON; takes no device."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # as in a plan
    experiment = _build(resolved)
    mesh = experiment.mesh
    if DEVICES.value is not None and DEVICES.value < 1:
        raise flags.UsageError(f"--devices={DEVICES.value} must be at least 1")
    if DEVICES.value is not None or -1 not in mesh.ici:
        experiment = experiment.on_devices(DEVICES.value or mesh.num_devices)
        mesh = experiment.mesh
    experiment.check_anywhere()
    found = {"config": experiment.name, "axes": mesh.axes, "ici": mesh.ici, "dcn": mesh.dcn}
    if -1 not in mesh.ici:
        found |= {"devices": mesh.num_devices, "global_batch_size": experiment.global_batch_size}
    found |= {"trains": experiment.train_data is not None, "eval_sets": [*experiment.eval_data]}
    print(json.dumps(found | {"num_steps": experiment.num_steps}))
    return 0


def _make_deterministic() -> None:
    """The flags of XLA, which it reads when jax starts its devices."""
    from paxlike import compat, xla_flags

    if not xla_flags.is_deterministic(os.environ) and compat.has_started():
        raise flags.UsageError(
            f"DETERMINISTIC=True comes too late: jax has started already without {xla_flags.DETERMINISTIC}"
        )
    xla_flags.make_deterministic(os.environ)


def _set_xla_flags(resolved) -> None:
    """The bundle of compiler flags, and a check of all flags; jax reads them when it starts its devices."""
    from paxlike import compat, xla_bundles

    name = getattr(resolved.tree, "xla_bundle", "none")
    if compat.has_started():
        if name not in ("auto", "none"):
            raise flags.UsageError(f"XLA_BUNDLE={name} comes too late: jax has started already")
        return
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", COMPILATION_CACHE.value)
    bundle, added = xla_bundles.apply(name, os.environ, folder=cache)
    level = bundle.optimization_level
    if level and "JAX_OPTIMIZATION_LEVEL" in os.environ:
        level = None
    if level:
        import jax

        jax.config.update("jax_optimization_level", level)
    if added or level:
        words = [*added, *([f"optimisation level {level}"] if level else [])]
        print(f"XLA bundle {bundle.name}: {' '.join(words)}", file=sys.stderr)


def _set_up_jax():
    """Everything global about JAX: processes, the compilation cache. Returns the watch over the other processes."""
    import jax

    from paxlike import compat
    from paxlike.cluster import environment

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", COMPILATION_CACHE.value)
    if cache:
        try:
            jax.config.update("jax_compilation_cache_dir", str(compat.program_cache(cache)))
        except OSError as error:
            jax.config.update("jax_compilation_cache_dir", None)
            print(f"compiled programs are not kept: {error}", file=sys.stderr)
    place = environment.find_place(
        os.environ,
        join=MULTIPROCESS.value,
        server_addr=SERVER_ADDR.value,
        num_hosts=NUM_HOSTS.value,
        host_idx=HOST_IDX.value,
    )
    if place is None:
        return None
    from paxlike.cluster import peers, processes, rank_log

    print(f"joining: {place}", file=sys.stderr)
    environment.start(place, heartbeat_timeout_seconds=peers.HEARTBEAT_SECONDS)
    if processes.alone():
        return None
    rank_log.keep(pathlib.Path(JOB_LOG_DIR.value), processes.index())
    return peers.Peers(pathlib.Path(JOB_LOG_DIR.value), describe=_describe)


if __name__ == "__main__":
    try:
        code = main(sys.argv)
        # A scheduler may send SIGTERM twice (to the process and to its group): the second one must not turn the exit
        # code of a run that has saved into that of one that was killed.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(code)
    # OSError: files, disks, time-outs. RuntimeError: of jax, where a device has no memory.
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        print(_describe(error), file=sys.stderr)
        sys.exit(2)
