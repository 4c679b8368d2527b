"""One changing line on a terminal; few plain lines elsewhere, the first and the last among them."""

import io
import re
import time

from paxlike.log.progress import Progress, duration, progress_lines, quantity


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """What a terminal shows after `text`, as lines."""
    lines = [""]
    for part in re.split(r"(\n|\r|\x1b\[K)", text):
        if part == "\n":
            lines.append("")
        elif part in ("\r", "\x1b[K"):
            lines[-1] = "" if part == "\x1b[K" else lines[-1]
        else:
            lines[-1] = part or lines[-1]
    return lines


def test_without_a_terminal_first_and_last_line_appear():
    stream = io.StringIO()
    progress = Progress(1000, stream=stream, interval_seconds=3600)
    for step in range(1, 1001):
        progress.update(step, f"loss {step / 10:.2f}")
    progress.close()
    first, last = stream.getvalue().splitlines()
    assert first == "train: step 1/1,000 (0%) | loss 0.10"
    assert last.startswith("train: step 1,000/1,000 (100%) | loss 100.00 | took ")


def test_without_a_terminal_lines_are_seconds_apart():
    stream = io.StringIO()
    progress = Progress(None, stream=stream, interval_seconds=0.2)
    start = time.monotonic()
    step = 0
    while time.monotonic() - start < 0.5:
        progress.update(step := step + 1)
    elapsed = time.monotonic() - start
    progress.close()
    # The first at once, then one every 0.2 s, and the last.
    assert 2 <= len(stream.getvalue().splitlines()) <= 2 + elapsed / 0.2 < step


def test_an_interrupted_count_still_shows_where_it_ended():
    stream = io.StringIO()
    progress = Progress(100, stream=stream, interval_seconds=3600)
    progress.update(1)
    progress.update(7, "loss 2.0")
    progress.close()
    assert "step 7/100 (7%) | loss 2.0" in stream.getvalue().splitlines()[-1]


def test_on_a_terminal_one_line_changes_and_written_lines_stay():
    stream = Terminal()
    progress = Progress(3, stream=stream)
    progress.update(1)
    progress.write("eval: loss 3")
    progress.update(3)
    progress.close()
    shown = screen(stream.getvalue())
    assert shown[0] == "eval: loss 3"
    assert shown[1].startswith("train: step 3/3 (100%)")
    assert shown[2:] == [""]


def test_busy_tells_what_is_going_on_and_how_long_it_took():
    stream = io.StringIO()
    with Progress(3, stream=stream).busy("compiling the train step"):
        assert stream.getvalue() == "compiling the train step ...\n"  # at once, not when it is over
    assert re.search(r"compiling the train step: \d+\.\ds\n$", stream.getvalue())


def test_busy_counts_seconds_on_a_terminal():
    stream = Terminal()
    with Progress(3, stream=stream).busy("compiling"):
        time.sleep(1.3)
        assert re.search(r"compiling \.\.\. \d+\.\ds", stream.getvalue())
    assert re.fullmatch(r"compiling: \d+\.\ds", screen(stream.getvalue())[0])


def test_eta_is_the_mean_pace_times_what_is_left():
    progress = Progress(100, enabled=False)
    assert progress.eta_seconds() is None
    start = time.monotonic()
    progress.update(50)  # a resumed run: the 50 steps before took no time here
    assert progress.eta_seconds() is None
    time.sleep(0.05)
    progress.update(55)
    assert 9 * 0.05 <= progress.eta_seconds() <= 9 * (time.monotonic() - start)
    progress.update(100)
    assert progress.eta_seconds() == 0.0


def test_disabled_prints_nothing():
    stream = io.StringIO()
    progress = Progress(2, stream=stream, enabled=False)
    progress.update(1)
    progress.write("line")
    with progress.busy("compiling"):
        pass
    progress.close()
    assert stream.getvalue() == ""


def test_a_stream_that_is_gone_does_not_stop_the_run():
    stream = io.StringIO()
    progress = Progress(2, stream=stream, interval_seconds=0)
    stream.close()
    progress.update(1)
    progress.update(2)
    progress.close()


def test_progress_lines_yields_everything_and_tells_the_total():
    stream = io.StringIO()
    assert list(progress_lines([5, 6, 7], "files", stream=stream, unit="file")) == [5, 6, 7]
    first, last = stream.getvalue().splitlines()
    assert first == "files: file 0/3 (0%)"
    assert last.startswith("files: file 3/3 (100%)")


def test_progress_lines_without_a_length():
    stream = io.StringIO()
    assert list(progress_lines((i for i in range(3)), "rows", stream=stream)) == [0, 1, 2]
    assert stream.getvalue().splitlines() == ["rows: item 0", "rows: item 3"]


def test_words_for_numbers():
    assert [duration(x) for x in (0, 9.96, 59.7, 3599.6, 86399)] == [
        "0.0s", "10.0s", "1m00s", "1h00m", "23h59m",
    ]  # fmt: skip
    assert [quantity(x) for x in (0, 999, 45210, 999_900, 3.1e9)] == [
        "0", "999", "45.2k", "1.00M", "3.10G",
    ]  # fmt: skip
