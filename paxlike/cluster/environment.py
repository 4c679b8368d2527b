"""Where this process stands among those of a run, from its flags or from what started it.

Known are Pax's flags, `JAX_*` variables, Slurm, Open MPI, and indexed jobs of Kubernetes (JobSet). All of it is
decided before jax starts: jax's own detection takes the name of a Slurm node as it is, and waits minutes where that
name does not resolve; it gives each Slurm task one GPU, also where a node has one task and eight GPUs.
"""

from __future__ import annotations

import dataclasses
import glob
import ipaddress
import re
import shutil
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator, Mapping

FIRST_PORT, NUM_PORTS = 61440, 4096  # above the ports that Linux gives to outgoing connections
JOIN_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of the run.

    Attributes:
      source: what told: "flags", "environment", "Slurm", "Open MPI" or "Kubernetes".
      num_processes, index: of the run.
      coordinator: host:port of process 0, as the others reach it.
      num_local, local_index: of the node; 1 and 0 where nothing tells.
      num_nodes: None where nothing tells.
      device_ids: the devices of the node that this process takes, None for all that it sees.
    """

    source: str
    num_processes: int
    index: int
    coordinator: str
    num_local: int = 1
    local_index: int = 0
    num_nodes: int | None = None
    device_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.num_processes < 1 or not 0 <= self.index < self.num_processes:
            raise ValueError(
                f"process {self.index} of {self.num_processes} ({self.source}): the number must be from 0 to one less "
                "than that of the processes"
            )
        split_address(self.coordinator)

    def __str__(self) -> str:
        nodes = "" if self.num_nodes is None else f" on {self.num_nodes} nodes"
        devices = (
            "all devices that it sees"
            if self.device_ids is None
            else f"device {', '.join(map(str, self.device_ids))} of its node"
        )
        return (
            f"process {self.index} of {self.num_processes}{nodes} ({self.source}), {devices}; "
            f"process 0 is at {self.coordinator}"
        )


def find_place(
    environ: Mapping[str, str],
    *,
    join: bool | None = None,
    server_addr: str | None = None,
    num_hosts: int | None = None,
    host_idx: int | None = None,
) -> Place | None:
    """The place of this process; None where it is a run of its own.

    `join` is the flag --multiprocess_gpu: None joins wherever a launcher started several processes in one step, since
    they would write into each other's folder otherwise; False never does. What the flags say comes first, then
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, then the launcher.

    Raises ValueError, in one line, for what is missing or does not fit together.
    """
    if join is False:
        return None
    launcher = _launcher(environ)
    address = server_addr or environ.get("JAX_COORDINATOR_ADDRESS")
    count = _first(num_hosts, _number(environ, "JAX_NUM_PROCESSES"), launcher and launcher.count)
    index = _first(host_idx, _number(environ, "JAX_PROCESS_ID"), launcher and launcher.index)
    if not join and server_addr is None and (count or 1) == 1:
        return None  # nobody asked, and there is no other process
    if count is None or index is None:
        raise ValueError(
            "--multiprocess_gpu: nothing tells how many processes there are and which this is; start it by srun, "
            "mpirun or a JobSet, or give --server_addr=HOST:PORT --num_hosts=N --host_idx=I"
        )
    if address is None:
        address = f"127.0.0.1:{FIRST_PORT}" if count == 1 else _address(launcher, count)
    source = "flags" if num_hosts is not None else launcher.name if launcher else "environment"
    local = launcher or _Launcher("", 1, 0)
    return Place(
        source=source,
        num_processes=count,
        index=index,
        coordinator=address,
        num_local=local.num_local,
        local_index=local.local_index,
        num_nodes=local.num_nodes,
        device_ids=_device_ids(environ, local),
    )


def start(place: Place, *, seconds: float = JOIN_SECONDS, **options) -> None:
    """Joins the other processes: `jax.distributed.initialize`, which must come before any device is made.

    Process 0 listens on the one address at which the others reach it. `options` go to jax.

    Raises:
      ValueError: the port is taken, or process 0 cannot be reached in time; one line.
    """
    import jax

    started = time.monotonic()
    deadline = started + seconds
    host, port = split_address(place.coordinator)
    if place.index == 0:
        while not resolve(host) and time.monotonic() < min(deadline, started + 20):
            time.sleep(0.3)  # the name of a pod comes after the pod
        options["coordinator_bind_address"] = bind_address(place.coordinator)
    elif place.num_processes > 1:
        wait_for(host, port, deadline=deadline, index=place.index)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.index,
        local_device_ids=place.device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(deadline - time.monotonic())),
        **options,
    )


def bind_address(coordinator: str) -> str:
    """The address:port on which process 0 listens: where the others reach it, and no other of this machine.

    Every address of the machine (`[::]`) where the others' name for it is none of its own, as behind a NAT.
    Raises ValueError where the port is taken.
    """
    host, port = split_address(coordinator)
    for family, address in resolve(host):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == 98:  # EADDRINUSE; gRPC would share the port with the other run
                    raise ValueError(
                        f"port {port} of {host} is taken, by another run perhaps: give another in "
                        f"--server_addr={host}:PORT (SERVER_PORT in the scripts)"
                    ) from None
                continue
        return f"[{address}]:{port}" if family == socket.AF_INET6 else f"{address}:{port}"
    return f"[::]:{port}"


def wait_for(host: str, port: int, *, deadline: float, index: int) -> None:
    """Waits until something listens at host:port; ValueError at `deadline` (of `time.monotonic`)."""
    started, reason = time.monotonic(), ""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {index} ({socket.gethostname()}) did not reach process 0 at {host}:{port} in "
                f"{time.monotonic() - started:.0f} s ({reason}): did process 0 start, is the name right "
                "(--server_addr=HOST:PORT sets it), does a firewall block the port?"
            )
        time.sleep(0.3)


def split_address(address: str) -> tuple[str, int]:
    """host and port of `host:port` or `[v6]:port`; ValueError where it is neither."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%]+)\]|([\w.-]+)):(\d{1,5})", address)
    if not match or not 0 < int(match[3]) < 65536:
        raise ValueError(
            f"--server_addr={address} is not HOST:PORT (JAX_COORDINATOR_ADDRESS has the same form)"
        )
    return match[1] or match[2], int(match[3])


def resolve(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses of a name, IPv4 first; none where it does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    pairs = dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found)
    return sorted(pairs, key=lambda pair: pair[0] != socket.AF_INET)


def expand_nodes(text: str) -> list[str]:
    """The names in a node list of Slurm.

    >>> expand_nodes("n[08-10,12],login,r[1-2]n[1-2]")
    ['n08', 'n09', 'n10', 'n12', 'login', 'r1n1', 'r1n2', 'r2n1', 'r2n2']
    """
    return [name for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) for name in _expand(part)]


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node, from what Slurm writes.

    >>> tasks_per_node("2(x3),1")
    [2, 2, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text} is not understood")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def visible_gpus(environ: Mapping[str, str]) -> int:
    """NVIDIA GPUs that this process sees, without starting any library."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not re.search(r"cuda|gpu", platforms):
        return 0
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        listed = [name.strip() for name in named.split(",")]
        return len([name for name in listed if name and name not in ("-1", "NoDevFiles")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


@dataclasses.dataclass(frozen=True)
class _Launcher:
    """What started the processes, and what it says."""

    name: str
    count: int
    index: int
    num_local: int = 1
    local_index: int = 0
    num_nodes: int | None = None
    first_node: str = ""  # Slurm's name of it
    address: str | None = None  # where it tells
    job: str = ""  # makes the port
    one_device_each: bool = False  # it hides the devices of the others


def _launcher(environ: Mapping[str, str]) -> _Launcher | None:
    for made in (_slurm(environ), _open_mpi(environ), _kubernetes(environ)):
        if made is not None:
            return made
    return None


def _slurm(environ: Mapping[str, str]) -> _Launcher | None:
    # A shell of an allocation, or of ssh, has some of Slurm's variables; only a task of a step has these.
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    if not all(environ.get(name) for name in needed):
        return None
    count = _first(_number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_NTASKS"))
    if count is None or (index := _number(environ, "SLURM_PROCID")) is None:
        return None
    nodes = expand_nodes(environ["SLURM_STEP_NODELIST"])
    node = _first(_number(environ, "SLURM_NODEID"), 0)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    counts = tasks_per_node(per_node) if per_node else []
    num_local = (
        counts[node] if len(counts) == len(nodes) > node else max(1, -(-count // len(nodes)))
    )
    bound = environ.get("SLURM_GPUS_PER_TASK") or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
    return _Launcher(
        "Slurm",
        count,
        index,
        num_local,
        _first(_number(environ, "SLURM_LOCALID"), 0),
        len(nodes),
        first_node=nodes[0],
        address=environ.get("SLURM_LAUNCH_NODE_IPADDR"),
        job=f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}",
        one_device_each=bool(bound),
    )


def _open_mpi(environ: Mapping[str, str]) -> _Launcher | None:
    count, index = (_number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if count is None or index is None:
        return None
    num_local = _first(_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"), 1)
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.search(r"tcp6?://\[?([^],]+)", uri)
    return _Launcher(
        "Open MPI",
        count,
        index,
        num_local,
        _first(_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), 0),
        address="127.0.0.1" if num_local == count else match[1].split(":")[0] if match else None,
        job=uri.split(";")[0] or environ.get("PMIX_NAMESPACE", "").split("@")[0],
    )


def _kubernetes(environ: Mapping[str, str]) -> _Launcher | None:
    index = _number(environ, "JOB_COMPLETION_INDEX")
    count = _number(environ, "JAX_NUM_PROCESSES")
    if index is None or count is None:
        return None
    return _Launcher("Kubernetes", count, index, num_nodes=count)


def _address(launcher: _Launcher | None, count: int) -> str:
    """host:port of process 0, where nothing says it outright."""
    if launcher is not None and launcher.first_node:
        host = _host_of(launcher.first_node, launcher.address, alone=launcher.num_nodes == 1)
    elif launcher is not None and launcher.address:
        host = launcher.address
    else:
        raise ValueError(
            f"{count} processes, and nothing tells where process 0 is: give --server_addr=HOST:PORT or set "
            "JAX_COORDINATOR_ADDRESS"
        )
    port = FIRST_PORT + zlib.crc32(launcher.job.encode()) % NUM_PORTS
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_of(node: str, launch_node: str | None, *, alone: bool) -> str:
    """An address of a Slurm node: its name where it resolves, else what slurm.conf says, else where srun ran.

    The latter is the first node in a batch job, but not where srun was typed on a login node.
    """
    if alone:
        return "127.0.0.1"
    found = [address for _, address in resolve(node)]
    if any(not ipaddress.ip_address(address.split("%")[0]).is_loopback for address in found):
        return node
    # /etc/hosts of some systems gives a machine's own name a loopback address, which the others cannot use.
    configured = _node_addr(node)
    if configured and resolve(configured):
        return configured
    if found:
        return node
    if launch_node:
        return launch_node
    raise ValueError(
        f"the first node of the Slurm step, {node}, does not resolve on {socket.gethostname()}: give "
        f"--server_addr=HOST:PORT, or set JAX_COORDINATOR_ADDRESS=HOST:PORT in the job, with an address of {node}"
    )


def _node_addr(node: str) -> str | None:
    scontrol = shutil.which("scontrol")
    if scontrol is None:  # as inside a container
        return None
    try:
        shown = subprocess.run(
            [scontrol, "show", "node", node], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\bNodeAddr=(\S+)", shown)
    return match[1] if match else None


def _device_ids(environ: Mapping[str, str], local: _Launcher) -> tuple[int, ...] | None:
    """The GPUs of the node that this process takes; None for all that it sees."""
    if named := environ.get("JAX_LOCAL_DEVICE_IDS"):
        return tuple(int(part) for part in named.split(","))
    seen = visible_gpus(environ)
    if local.num_local == 1 or seen <= 1 or local.one_device_each:
        return None
    if seen % local.num_local:
        raise ValueError(
            f"{local.num_local} processes on this node see {seen} GPUs, which do not divide among them: start "
            f"{seen} (one for each GPU) or 1 (for all of them) on each node"
        )
    each = seen // local.num_local
    return tuple(range(local.local_index * each, (local.local_index + 1) * each))


def _expand(part: str) -> Iterator[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if not match:
        yield part
        return
    before, inside, after = match.groups()
    for piece in inside.split(","):
        low, _, high = piece.partition("-")
        for number in range(int(low), int(high or low) + 1):
            for rest in _expand(after):
                yield f"{before}{number:0{len(low)}d}{rest}"


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if not text:
        return None
    if not text.isdigit():
        raise ValueError(f"{name}={text} is not a number")
    return int(text)


def _first(*values):
    return next((value for value in values if value is not None), None)
