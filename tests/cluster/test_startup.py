"""What the start-up check says of facts and of a mesh."""

import jax
import pytest
import runs
from absl.testing import flagsaver

from paxlike import parallel
from paxlike.cluster import startup
from paxlike.cluster.startup import measure_axes, odd_one_out


def name(rank):
    return f"process {rank}"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (["a", "a", "a"], None),
        (["a"], None),
        (["a", "a", "b", "a"], "process 2 has X b, the other 3 have a"),
        (["b", "a", "c", "a", "a"], "process 0 has X b, 3 others have a"),
        (["a", "b"], "process 0 has X a, process 1 has b"),
    ],
)
def test_the_odd_one_is_the_one_that_few_are_like(values, line):
    assert odd_one_out(values, name, "X") == line


def test_clocks():
    startup._check_clocks([100.0, 101.0, 100.5])
    with pytest.raises(ValueError, match=r"the clock of process 1 is 30\.0 s away"):
        startup._check_clocks([100.0, 130.0, 100.0])


def test_devices_that_one_process_lacks():
    facts = [{"host": f"n{n}", "pid": n, "num_devices": 8, "kind": "H100"} for n in range(3)]
    startup._check_devices(facts)
    facts[1]["num_devices"] = 1
    with pytest.raises(ValueError, match=r"process 1 \(host n1, pid 1\) has the devices 1 x H100"):
        startup._check_devices(facts)


def test_alone_every_axis_is_summed(tmp_path):
    report = startup.compare_processes(tmp_path, "config")
    assert report.line.startswith("1 node, 1 process, 4 x cpu each; jax ")
    mesh = parallel.Mesh(ici=(2, 1, 2)).build()
    lines = measure_axes(mesh, [each["host"] for each in report.facts])
    assert [line.split(":")[0] for line in lines] == [
        "axis data (2) crosses devices of a process",
        "axis tensor (2) crosses devices of a process",
    ]
    assert all("sum right, " in line and "GB/s" in line for line in lines)
    assert list((tmp_path / "processes").iterdir()) == []


def test_a_wrong_sum_names_device_and_process(monkeypatch):
    right = jax.lax.psum

    def wrong(x, axis):
        return right(x, axis) + (jax.lax.axis_index("fsdp") == 1)

    monkeypatch.setattr(jax.lax, "psum", wrong)
    mesh = parallel.Mesh(ici=(2, 2, 1)).build()
    with pytest.raises(ValueError, match=r"the mesh axis data is wrong on device 1 of process 0"):
        measure_axes(mesh, ["here"])


def test_the_check_alone(tmp_path, capfd):
    import main

    tiny = [f"--fdl.{name}={value}" for name, value in runs.TINY.items()]
    mesh = ["--fdl.ICI_MESH_SHAPE=[1,4,1]", "--fdl.DCN_MESH_SHAPE=[1,1,1]"]
    flags = ["--fdl_config=Synthetic126M", f"--job_log_dir={tmp_path}", "--mode=check_cluster"]
    with flagsaver.flagsaver():
        assert main.main(["main.py", *flags, *tiny, *mesh]) == 0
    said = capfd.readouterr().err.splitlines()
    assert said[-2].startswith("check: 1 node, 1 process, 4 x cpu each; ")
    assert said[-1].startswith("axis fsdp (4) crosses devices of a process: sum right, ")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="process 0 cannot write in "):
        startup.compare_processes(tmp_path / "file", "config")
