"""Which process this is, from what started it: nothing here starts jax."""

import contextlib
import socket
import time

import pytest

from paxlike.cluster import environment
from paxlike.cluster.environment import bind_address, find_place, wait_for

# What Slurm 22.05 gave the third of four tasks on two nodes.
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.9.9.9",  # of the login node, where srun was typed there
    "JAX_PLATFORMS": "cpu",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
KUBERNETES = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "3",
    "JAX_NUM_PROCESSES": "4",
    "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:61440",
}


@pytest.fixture
def names(monkeypatch):
    """Host names and their addresses, and no scontrol; a test fills them."""
    table = {"n1": "10.0.0.1", "n2": "10.0.0.2"}

    def getaddrinfo(host, *_, **__):
        if host in table or host[0].isdigit():
            return [(socket.AF_INET, None, 6, "", (table.get(host, host), 0))]
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(environment, "_node_addr", lambda node: None)
    return table


def test_without_a_launcher_it_is_a_run_of_its_own():
    assert find_place({}) is None
    assert find_place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    one = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find_place(one) is None


def test_several_tasks_of_a_slurm_step_join_by_themselves(names):
    place = find_place(SLURM)
    assert (place.source, place.num_processes, place.index) == ("Slurm", 4, 2)
    assert (place.num_local, place.local_index, place.num_nodes) == (2, 0, 2)
    host, port = environment.split_address(place.coordinator)
    assert host == "n1" and 61440 <= port < 65536
    assert place == find_place(SLURM, join=True)
    assert "process 2 of 4 on 2 nodes" in str(place)


def test_they_stay_apart_when_told_to(names):
    assert find_place(SLURM, join=False) is None


def test_steps_and_jobs_have_ports_of_their_own(names):
    changes = ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"}, {"SLURM_JOB_ID": "4103"})
    assert len({find_place(SLURM | change).coordinator for change in changes}) == 4


def test_a_step_on_one_node_needs_no_name(names):
    one = SLURM | {"SLURM_STEP_NODELIST": "odd", "SLURM_STEP_TASKS_PER_NODE": "4"}
    place = find_place(one | {"SLURM_NODEID": "0", "SLURM_LOCALID": "2"})
    assert place.coordinator.startswith("127.0.0.1:") and place.num_local == 4


def test_a_node_name_that_does_not_resolve_is_said_at_once(names, monkeypatch):
    del names["n1"]
    assert find_place(SLURM).coordinator.startswith("10.9.9.9:")  # where srun ran: the best guess
    monkeypatch.delitem(SLURM, "SLURM_LAUNCH_NODE_IPADDR")
    with pytest.raises(
        ValueError, match=r"n1, does not resolve .*JAX_COORDINATOR_ADDRESS"
    ) as error:
        find_place(SLURM)
    assert "\n" not in str(error.value)


def test_slurm_conf_knows_the_address_of_a_name_that_does_not_resolve(names, monkeypatch):
    names["n1"] = "127.0.1.1"  # as /etc/hosts of Debian says on n1 itself
    monkeypatch.setattr(environment, "_node_addr", lambda node: "10.1.1.1")
    assert find_place(SLURM).coordinator.startswith("10.1.1.1:")


def test_an_address_in_the_environment_or_a_flag_is_taken(names):
    del names["n1"]
    given = SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}
    assert find_place(given).coordinator == "a:1"
    assert find_place(given, server_addr="b:2").coordinator == "b:2"


def test_the_flags_of_pax_alone():
    place = find_place({}, join=True, server_addr="10.0.0.1:12345", num_hosts=16, host_idx=3)
    assert (place.source, place.num_processes, place.index) == ("flags", 16, 3)
    assert place.coordinator == "10.0.0.1:12345" and place.device_ids is None


def test_flags_come_before_slurm_but_the_devices_are_those_of_the_task(names):
    gpus = SLURM | {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_LOCALID": "1"}
    place = find_place(gpus, join=True, server_addr="10.0.0.1:12345", num_hosts=4, host_idx=3)
    assert (place.source, place.index, place.device_ids) == ("flags", 3, (1,))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"join": True}, "nothing tells how many processes there are"),
        ({"server_addr": "h:1", "num_hosts": 2}, "nothing tells how many processes"),
        ({"server_addr": "h:1", "num_hosts": 2, "host_idx": 2}, "process 2 of 2 "),
        ({"server_addr": "h", "num_hosts": 2, "host_idx": 0}, "server_addr=h is not HOST:PORT"),
        ({"server_addr": "h:70000", "num_hosts": 2, "host_idx": 0}, "is not HOST:PORT"),
        ({"join": True, "num_hosts": 2, "host_idx": 0}, "nothing tells where process 0 is"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        find_place({}, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "gpus, tasks, extra, ids",
    [
        ("0,1,2,3,4,5,6,7", 8, {}, (5,)),  # a process for each GPU, which sees all of them
        ("0,1,2,3,4,5,6,7", 1, {}, None),  # a process for the node
        ("0,1,2,3,4,5,6,7", 4, {"SLURM_LOCALID": "3"}, (6, 7)),
        ("5", 8, {}, None),  # --gpus-per-task=1: it sees its own only
        ("0,1", 2, {"SLURM_LOCALID": "1", "SLURM_GPUS_PER_TASK": "2"}, None),
        ("0,1", 2, {"SLURM_LOCALID": "1", "SLURM_TRES_PER_TASK": "cpu:4,gres:gpu:2"}, None),
        ("0,1,2,3", 8, {"JAX_LOCAL_DEVICE_IDS": "2"}, (2,)),
        ("", 8, {}, None),
    ],
)
def test_the_gpus_of_a_task(names, gpus, tasks, extra, ids):
    task = SLURM | {"SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)", "SLURM_LOCALID": "5"}
    task |= {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": gpus} | extra
    assert find_place(task).device_ids == ids


def test_gpus_that_do_not_divide_among_the_tasks_are_refused(names):
    task = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "JAX_PLATFORMS": ""}
    task |= {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_NODEID": "0"}
    with pytest.raises(ValueError, match=r"3 processes on this node see 4 GPUs.*start 4 .* or 1 "):
        find_place(task)


def test_open_mpi():
    place = find_place(MPI)
    assert (place.source, place.num_processes, place.index) == ("Open MPI", 2, 1)
    assert place.coordinator.startswith("10.96.0.1:")
    newer = {key: text for key, text in MPI.items() if "hnp" not in key}
    with pytest.raises(ValueError, match="nothing tells where process 0 is"):
        find_place(newer)
    here = find_place(newer | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prte-1@1"})
    assert here.coordinator.startswith("127.0.0.1:")


def test_an_indexed_job_of_kubernetes():
    place = find_place(KUBERNETES)
    assert (place.source, place.num_processes, place.index) == ("Kubernetes", 4, 3)
    assert place.coordinator == "run-workers-0-0.run:61440" and place.num_nodes == 4


def test_a_launcher_that_writes_nonsense_is_named():
    with pytest.raises(ValueError, match="SLURM_PROCID=two is not a number"):
        find_place(SLURM | {"SLURM_PROCID": "two"})


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_process_0_listens_where_the_others_reach_it_and_nowhere_else(monkeypatch):
    port = free_port()
    assert bind_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    found = [(socket.AF_INET, None, 6, "", ("192.0.2.1", 0))]  # no address of any machine
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert bind_address(f"behind-a-nat:{port}") == f"[::]:{port}"


def test_a_taken_port_is_said_in_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is taken"):
            bind_address(f"127.0.0.1:{port}")


def test_waiting_for_process_0():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        wait_for("127.0.0.1", server.getsockname()[1], deadline=time.monotonic() + 5, index=1)
    with pytest.raises(
        ValueError, match="process 1 .* did not reach process 0 at 127.0.0.1"
    ) as error:
        wait_for("127.0.0.1", free_port(), deadline=time.monotonic(), index=1)
    assert "\n" not in str(error.value)
