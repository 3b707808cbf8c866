"""Other processes and threads: a fork after use, two writers of one rule, two callers
at once, a truncated cache.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from kept_calls import assert_equal, batch_of, result

import reweight_ops as rw
from reweight_ops._core import files
from reweight_ops._core.backends import cpu_threads, triton_cache
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.files import write_atomically
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.formula.triton import program_py

HAS_CPU = (
    unsupported_reason("cpu", Request("token_stats", torch.device("cpu"), torch.float32)) is None
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def script(text: str, timeout: float = 120, **environment: str) -> str:
    """The output of a separate process; a child that hangs fails."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


FORK = """
    import faulthandler, os, sys, torch
    import reweight_ops as rw

    rows, vocab = 64, 20000
    z = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, adv = torch.arange(rows), torch.ones(rows)

    def call():
        loss = rw.policy_loss(z, ids, adv, spec="reinforce", backend="cpu").loss
        return loss.item(), torch.autograd.grad(loss, z)[0]

    torch.set_num_threads({threads})
    {before}
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(30, exit=True)
        value, grad = call()
        os._exit(0 if value == expected and hash(grad.numpy().tobytes()) == total else 3)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, status
    again = call()
    assert again[0] == expected and hash(again[1].numpy().tobytes()) == total
    from reweight_ops._core.backends.cpu_threads import threads
    assert threads() == {threads}, "the parent has its threads"
"""


@pytest.mark.skipif(not HAS_CPU or not hasattr(os, "fork"), reason="no C++ backend, or no fork")
def test_a_fork_after_use():
    """The parent's workers are not in the child, and OpenMP would wait for them
    forever.
    """
    script(
        FORK.format(
            threads=2, before="expected, grad = call(); total = hash(grad.numpy().tobytes())"
        ),
        PYTHONHASHSEED="0",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("had, expected", [(True, 1), (False, 2)])
def test_the_threads_of_a_child(had, expected, monkeypatch):
    """One, where the parent had workers to lose; else PyTorch's number."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_threads, "_lost", False)
    monkeypatch.setattr(cpu_threads, "_had_threads", had)
    assert cpu_threads.threads() == 2
    cpu_threads._in_child()
    assert cpu_threads.threads() == expected


def test_what_a_process_had_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_threads, "_TASKS", tmp_path)
    for names, expected in ((["1"], False), (["1", "2"], True)):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
        cpu_threads._before_fork()
        assert cpu_threads._had_threads is expected
    monkeypatch.setattr(cpu_threads, "_TASKS", tmp_path / "missing")
    cpu_threads._before_fork()
    assert cpu_threads._had_threads is True


def test_threads_call_at_once():
    """Each its own signatures and the others': results are those of one
    thread alone."""
    specs = [rw.methods.grpo(beta=0.1), rw.methods.gspo(), rw.methods.dapo()]
    batches = [batch_of(spec, k, (3, 5 + k % 2)) for k, spec in enumerate(specs)]
    expected = [result(batch, spec=spec) for spec, batch in zip(specs, batches, strict=True)]
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def run(first: int) -> None:
        try:
            start.wait()
            for step in range(60):
                k = (first + step) % len(specs)
                assert_equal(result(batches[k], spec=specs[k]), expected[k])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not errors, errors[0]
    assert not any(worker.is_alive() for worker in workers)


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.py"
    write_atomically(path, "old")
    for name, error in (
        ("chmod", OSError(28, "No space left on device")),
        ("replace", KeyboardInterrupt()),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(files.Path, name, lambda *a, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                write_atomically(path, "new")
        assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    write_atomically(path, "new é")
    assert path.read_bytes() == "new é".encode() and list(path.parent.iterdir()) == [path]


@needs_triton
@pytest.mark.parametrize(
    "left",
    [b"", b"import tri", b"\xff\xfe\x00", None],
    ids=["nothing", "a part", "no text", "short bytecode"],
)
def test_a_file_that_a_crash_left_is_written_again(left, tmp_path):
    text = (
        program_py(Program.of(("reinforce",)))
        + "# of this test alone: what another test has loaded would not be written\n"
    )
    module = triton_cache.load_source(text, tmp_path)
    try:
        path = tmp_path / "programs" / f"{module.__name__}.py"
        if left is not None:
            path.write_bytes(left)
        for bytecode in path.parent.glob("__pycache__/*"):
            bytecode.write_bytes(bytecode.read_bytes()[:40])
        del sys.modules[module.__name__]
        assert triton_cache.load_source(text, tmp_path).program is not None
        assert path.read_text() == text
    finally:
        sys.modules.pop(module.__name__, None)


@needs_triton
def test_processes_that_write_one_rule_at_once(tmp_path):
    code = """
        import sys, time, torch
        import reweight_ops as rw
        from reweight_ops._core.backends.triton_cache import program_function
        from reweight_ops._core.formula.loss_program import Program

        time.sleep(max(float(sys.argv[1]) - time.time(), 0))
        for name in ("reinforce", "clip", "cispo", "sapo"):
            assert program_function(Program.of((name,))) is not None
        print("done")
    """
    start = str(time.time() + 8)  # when both have imported what they need
    environment = {**os.environ, "REWEIGHT_OPS_CACHE": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), start]
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        out, error = process.communicate(timeout=180)
        assert process.returncode == 0 and out == "done\n", error[-2000:]
    names = [path.name for path in (tmp_path / "programs").iterdir() if path.is_file()]
    assert len(names) == 4 and all(
        name.endswith(".py") and not name.startswith(".") for name in names
    )
