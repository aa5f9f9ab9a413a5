"""Jobs in worker processes: results, order, errors, killed and interrupted workers."""

import multiprocessing
import os
import subprocess
import sys

import processes
import pytest
import torch
import worker_jobs

from debiaskd.utils.workers import Job, WorkerError, cores, run_jobs

pytestmark = pytest.mark.xdist_group("workers")
SUMS = [
    Job("a", worker_jobs.add, (1, 2)),
    Job("b", worker_jobs.add, (3, 4), after="a"),
    Job("c", worker_jobs.add, (5, 6)),
]


@pytest.fixture
def forked(monkeypatch):
    """Workers that start in milliseconds; `test_a_script_needs_no_main_guard` spawns its own."""
    monkeypatch.setattr("debiaskd.utils.workers.get_context", lambda method: processes.context())


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("workers", [1, 2])
def test_results_news_and_warnings(workers):
    told, threads = [], torch.get_num_threads()
    with pytest.warns(UserWarning, match="odd") as warned:
        found = run_jobs(
            SUMS,
            workers,
            begun=lambda key: told.append((key, "begun")),
            news=lambda key, news: told.append((key, news)),
            ended=lambda key: told.append((key, "ended")),
        )
    assert {key: value.tolist() for key, value in found.items()} == {"a": [3], "b": [7], "c": [11]}
    assert sorted(str(one.message) for one in warned) == ["1 is odd", "3 is odd", "5 is odd"]
    for job in SUMS:
        first, second = job.arguments
        assert [text for key, text in told if key == job.key] == ["begun", f"adding {first} and {second}", "ended"]
    assert told.index(("a", "ended")) < told.index(("b", "begun"))
    assert torch.get_num_threads() == threads and not multiprocessing.active_children()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (Job("x", worker_jobs.fail, ("what went wrong",)), KeyError, "what went wrong"),
        (Job("x", worker_jobs.kill), WorkerError, "the worker process of x was killed, perhaps for want of memory"),
        (Job("x", worker_jobs.process), KeyboardInterrupt, None),
    ],
    ids=["error", "killed", "interrupted"],
)
def test_other_workers_end_and_leave_nothing_unfinished(tmp_path, job, error, message):
    """`job` begins once the other worker writes a file that it never finishes."""
    writing = False

    def news(key, text):
        nonlocal writing
        writing = text == "writing"
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt

    jobs = [Job("first", worker_jobs.process), Job("writes", worker_jobs.write_for_ever, (tmp_path / "file",))]
    jobs += [Job("waits", worker_jobs.wait_for, (tmp_path,), after="first"), job]
    with pytest.raises(error, match=message):
        run_jobs(jobs, 2, news=news)
    assert writing and not multiprocessing.active_children()
    assert list(tmp_path.iterdir()) == []


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; print('imported')\n"
        f"sys.path.insert(0, {os.path.dirname(worker_jobs.__file__)!r})\n"
        "import worker_jobs; from debiaskd.utils.workers import Job, run_jobs\n"
        "found = run_jobs([Job(i, worker_jobs.process) for i in range(2)], 2)\n"
        "import os; print(os.getpid() in found.values())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["imported", "False"]


def test_a_job_comes_after_its_predecessor():
    with pytest.raises(ValueError, match="jobs must come after their predecessors, got 'b' before 'a'"):
        run_jobs([SUMS[1], SUMS[0]], 2)


def test_cores():
    assert 1 <= cores() <= (os.cpu_count() or 1)
