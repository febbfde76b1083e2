"""The distillation loss against float64: in PyTorch, in Triton's interpreter, compiled ahead of time, on a GPU.

The interpreter is chosen when a kernel is decorated, so its cases run in one child process: this file as a script.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import interpreter
from support.losses import oracle, random_case
from torch.nn import functional as F

import kernels
from kernels import reference
from kernels.loss.ccd import ccd_loss

ROOT = Path(__file__).parents[2]
CLASSES = {10: 3, 100: 2, 257: 2, 1000: 2}  # classes: batch; the interpreter takes 30 ms for a row


def one_hot(index: torch.Tensor, classes: int, gap: float = 1e4) -> torch.Tensor:
    return F.one_hot(index, classes) * gap


def cases_of(classes: int, batch: int) -> dict[str, dict]:
    def case(**changes) -> dict:
        return random_case(classes, batch, **changes)

    confident, late = case(alpha=1.0, report="exact"), case(alpha=0.0, report="exact")
    wrong, strided = case(), case()
    hot = one_hot(confident["target"], classes)
    confident["logits"][:2] = [row + hot / 500 for row in confident["logits"][:2]]
    wrong["logits"][2:] = [hot, hot.roll(1, dims=1)]
    late["logits"][2:] = [row + 0.3 * row.cos() for row in late["logits"][:2]]
    strided["logits"][2:] = torch.stack(strided["logits"][2:], dim=1).unbind(1)
    strided["logits"][0] = strided["logits"][0].T.contiguous().T
    strided["target"] = strided["target"].int()
    return {
        "plain": case(),
        "flat": case(scale=0.5),
        "sharp": case(scale=10.0),
        "all +1e4": case(offsets=(1e4, 1e4, 1e4, 1e4)),
        "all -1e4": case(offsets=(-1e4, -1e4, -1e4, -1e4)),
        "opposed by 1e4": case(offsets=(1e4, -1e4, -1e4, 1e4)),
        "confident student, alpha 1": confident,
        "one-hot teacher": wrong,
        "student near its teacher, alpha 0": late,
        "strided rows": strided,
        "given weight": case(weight=torch.linspace(0, 2, batch)),
        "kd": case(weight=torch.ones(batch)),
        "alpha 0": case(alpha=0.0),
        "alpha 1": case(alpha=1.0),
        "T 1": case(temperature=1.0),
        "T 1, alpha 0": case(temperature=1.0, alpha=0.0),
    }


CASES = {f"{name}, C {c}": case for c, b in CLASSES.items() for name, case in cases_of(c, b).items()}


def evaluate(case: dict, impl: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Loss and gradients by the students; `case["loss_scale"]` multiplies the loss before backward."""
    logits = [row.detach().to(device) for row in case["logits"]]
    students = [row.requires_grad_() for row in logits[:2]]
    options = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in case["options"].items()
    }
    loss = ccd_loss(*logits, case["target"].to(device), impl=impl, **options)
    (loss * case.get("loss_scale", 1.0)).backward()
    return {"loss": loss.detach(), "grad_o": students[0].grad, "grad_a": students[1].grad}


def special_cases() -> dict[str, dict]:
    """Cases with claims of their own."""
    same = random_case(100, 3, alpha=0.0)
    hot = one_hot(same["target"], 100).float()
    same["logits"] = [hot] * 4
    masked = random_case(10, 4, weight=torch.ones(4))
    masked["logits"][2:] = [one_hot(masked["target"], 10).log()] * 2
    unknown, poisoned = random_case(10, 2), random_case(10, 2)
    unknown["target"][1] = 10
    poisoned["logits"][3][0, 7] = float("nan")
    undirected = random_case(10, 3)
    undirected["logits"][3][1] = 0
    half, bfloat = (random_case(1000, 2, scale=2.0) | {"loss_scale": 4096.0} for _ in range(2))
    half["logits"][:2] = [row.half() for row in half["logits"][:2]]
    bfloat["logits"][:2] = [row.bfloat16() for row in bfloat["logits"][:2]]
    return {
        "student equals its one-hot teacher": same,
        "teacher of -inf": masked,
        "target out of range": unknown,
        "nan": poisoned,
        "teacher row of zeros": undirected,
        "float16": half,
        "bfloat16": bfloat,
    }


def interpret(path: Path) -> None:
    """In the child: evaluate the cases of a file by the Triton kernel and write the results beside it."""
    interpreter.hasten()
    cases = torch.load(path)
    results = {name: evaluate(case, "triton") for name, case in cases.items()}
    plain = cases["plain, C 10"]
    student = plain["logits"][0].clone().requires_grad_()
    loss = ccd_loss(student, *plain["logits"][1:], plain["target"], impl="triton", **plain["options"])
    (tripled,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    (once_more,) = torch.autograd.grad(loss, student)
    results["backward twice"] = {"tripled": tripled, "once more": once_more}
    with torch.no_grad():
        results["no grad"] = ccd_loss(*plain["logits"], plain["target"], impl="triton", **plain["options"])
    results["again"] = evaluate(plain, "triton")
    results["auto"] = evaluate(plain, "auto")
    torch.save(results, path.with_suffix(".out"))


@pytest.fixture(scope="module")
def triton(tmp_path_factory) -> dict[str, dict]:
    """What the kernel computed in the interpreter, by case."""
    path = tmp_path_factory.mktemp("ccd") / "cases"
    torch.save(CASES | special_cases(), path)
    child = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", __file__, path],
        env=os.environ | interpreter.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return torch.load(path.with_suffix(".out"))


def result_of(impl: str, name: str, request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    if impl == "triton":
        return request.getfixturevalue("triton")[name]
    return evaluate((CASES | special_cases())[name], impl)


def assert_meets_float64(result: dict, expected: dict) -> None:
    """Loss to 1e-6 relative; gradient to 1e-7 + 1e-6·max, its rows summing to 0 within 1e-6."""
    assert abs(result["loss"].double().cpu() - expected["loss"]) <= 1e-6 * expected["loss"]
    for grad in ("grad_o", "grad_a"):
        actual, exact = result[grad].double().cpu(), expected[grad]
        assert (actual - exact).abs().max() <= 1e-7 + 1e-6 * exact.abs().max()
        assert actual.sum(1).abs().max() <= 1e-6


@given(
    batch=st.integers(1, 5),
    classes=st.integers(2, 30),
    temperature=st.floats(0.5, 10),
    alpha=st.floats(0, 1),
    kd_weight=st.floats(0.1, 5),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_the_reference_is_the_published_loss_and_gradient(
    batch, classes, temperature, alpha, kd_weight, weighted, seed
):
    """Written once more from PyTorch's own losses, and the gradient in closed form."""
    torch.manual_seed(seed)
    z_o, z_a, t_o, t_a = torch.randn(4, batch, classes, dtype=torch.float64) * 3
    target = torch.randint(classes, (batch,))
    given_weight = torch.rand(batch, dtype=torch.float64) if weighted else None
    w = given_weight if weighted else 1 + F.cosine_similarity(t_o, t_a)

    def divergence(z, t):
        return F.kl_div((z / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="none").sum(1)

    def gradient(z, t, row_weight):
        hard = z.softmax(1) - F.one_hot(target, classes)
        soft = (z / temperature).softmax(1) - (t / temperature).softmax(1)
        return kd_weight / (2 * batch) * (alpha * hard + (1 - alpha) * temperature * row_weight * soft)

    hard = F.cross_entropy(torch.cat([z_o, z_a]), target.repeat(2))
    soft = (divergence(z_o, t_o).mean() + (w * divergence(z_a, t_a)).mean()) / 2
    expected = {
        "loss": kd_weight * (alpha * hard + (1 - alpha) * temperature**2 * soft),
        "grad_o": gradient(z_o, t_o, torch.ones_like(w[:, None])),
        "grad_a": gradient(z_a, t_a, w[:, None]),
    }
    options = {"temperature": temperature, "alpha": alpha, "kd_weight": kd_weight, "weight": given_weight}
    result = oracle({"logits": [z_o, z_a, t_o, t_a], "target": target, "options": options})
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_is_one_plus_the_cosine_and_never_negative(dtype):
    o = torch.randn(1000, 50, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 1e4
    a = torch.cat([o[:500].flip(1), -o[500:]])
    a[0] = 0
    weight = reference.cosine_weight(o, a)
    exact = 1 + F.cosine_similarity(o.double(), a.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(weight.double(), exact, rtol=0, atol=tolerance)
    assert weight.dtype == dtype and weight.min() >= 0 and weight[0] == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_loss_and_gradient_meet_float64(impl, name, request):
    assert_meets_float64(result_of(impl, name, request), oracle(CASES[name]))


@pytest.mark.parametrize("name", ["teacher of -inf", "teacher row of zeros"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_degenerate_teachers_meet_float64(impl, name, request):
    assert_meets_float64(result_of(impl, name, request), oracle(special_cases()[name]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_student_equal_to_its_one_hot_teacher_has_loss_and_gradient_zero(impl, request):
    result = result_of(impl, "student equals its one-hot teacher", request)
    assert all(not tensor.any() for tensor in result.values())


@pytest.mark.parametrize(("name", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_16_bit_students_get_their_gradient_after_loss_scaling(impl, name, rounding, request):
    """Most of these gradients are below float16's smallest number until they meet the scale of 4096."""
    case = special_cases()[name]
    result, expected = result_of(impl, name, request), oracle(case)
    assert result["loss"].dtype == torch.float32
    torch.testing.assert_close(result["loss"].double(), expected["loss"], rtol=1e-6, atol=0)
    for grad in ("grad_o", "grad_a"):
        assert result[grad].dtype == case["logits"][0].dtype
        exact = expected[grad] * case["loss_scale"]
        torch.testing.assert_close(result[grad].double(), exact, rtol=1.01 * rounding, atol=1e-3 * rounding)


def test_a_nan_or_a_target_out_of_range_makes_the_kernels_loss_nan(triton):
    """A kernel cannot raise without a synchronisation; it must not pass silently either."""
    assert triton["nan"]["loss"].isnan() and triton["target out of range"]["loss"].isnan()


def test_torch_keeps_a_nan_and_refuses_a_target_out_of_range():
    cases = special_cases()
    assert evaluate(cases["nan"], "torch")["loss"].isnan()
    with pytest.raises(RuntimeError, match="index 10 is out of bounds"):
        evaluate(cases["target out of range"], "torch")


def test_the_kernel_is_deterministic_and_its_loss_the_same_without_gradient(triton):
    torch.testing.assert_close(triton["again"], triton["plain, C 10"], rtol=0, atol=0)
    assert triton["no grad"] == triton["plain, C 10"]["loss"]


def test_backward_scales_by_the_incoming_gradient_and_keeps_the_stored_one(triton):
    grads, expected = triton["backward twice"], triton["plain, C 10"]["grad_o"]
    torch.testing.assert_close(grads["tripled"], 3 * expected, rtol=0, atol=0)
    torch.testing.assert_close(grads["once more"], expected, rtol=0, atol=0)


def test_auto_takes_torch_on_the_cpu_even_if_the_interpreter_is_on(triton):
    expected = evaluate(CASES["plain, C 10"], "torch")
    torch.testing.assert_close(triton["auto"], expected, rtol=0, atol=0)
    torch.testing.assert_close(evaluate(CASES["plain, C 10"], "auto"), expected, rtol=0, atol=0)


def test_parts_leave_the_loss_differentiable():
    case = CASES["plain, C 10"]
    students = [row.clone().requires_grad_() for row in case["logits"][:2]]
    loss, parts = ccd_loss(*students, *case["logits"][2:], case["target"], parts=True)
    expected = evaluate(case, "torch")
    torch.testing.assert_close(torch.autograd.grad(loss, students), (expected["grad_o"], expected["grad_a"]))
    assert not any(part.requires_grad for part in parts)
    total = (parts.ce_o + parts.ce_a).mean() / 2 + 16 * (parts.kl_o + parts.w * parts.kl_a).mean() / 2
    torch.testing.assert_close(total, expected["loss"])


def test_float64_stays_float64():
    case = CASES["plain, C 100"]
    wide = case | {"logits": [row.double() for row in case["logits"]]}
    torch.testing.assert_close(evaluate(wide, "auto"), oracle(case), rtol=0, atol=0)


def test_triton_refuses_tensors_that_it_cannot_reach():
    with pytest.raises(ValueError, match=r'impl="triton": expected CUDA tensors .* got cpu'):
        evaluate(CASES["plain, C 10"], "triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_o": torch.zeros(10)}, r"student_o: expected logits \(B, C\), got shape \(10,\)"),
        ({"student_o": torch.zeros(0, 10)}, r"student_o: expected logits \(B, C\), got shape \(0, 10\)"),
        ({"student_a": torch.zeros(2, 9)}, r"student_a: expected shape \(2, 10\), got \(2, 9\)"),
        ({"teacher_a": torch.zeros(2, 10).long()}, "teacher_a: expected a floating dtype, got torch.int64"),
        ({"teacher_o": torch.zeros(2, 10, device="meta")}, "teacher_o: expected device cpu, got meta"),
        ({"target": torch.zeros(3).long()}, r"target: expected shape \(2,\), got \(3,\)"),
        ({"target": torch.zeros(2)}, "target: expected an integer dtype, got torch.float32"),
        ({"target": torch.zeros(2).bool()}, "target: expected an integer dtype, got torch.bool"),
        ({"weight": torch.ones(2, 1)}, r"weight: expected shape \(2,\), got \(2, 1\)"),
        ({"weight": torch.ones(2).int()}, "weight: expected a floating dtype, got torch.int32"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a number in \[0, 1\], got -0.1"),
        ({"valid": torch.ones(2)}, "valid: expected torch.bool, got torch.float32"),
        ({"count": 0}, "count: expected a number > 0, got 0"),
        ({"loss_scale": torch.ones(2)}, r"loss_scale: expected one number, got shape \(2,\)"),
        ({"inplace": True}, "inplace: expected the kernel"),
        ({"alpha": 1.5}, r"alpha: expected a number in \[0, 1\], got 1.5"),
        ({"impl": "cuda"}, "impl: expected .* got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    logits = {name: torch.zeros(2, 10) for name in ("student_o", "student_a", "teacher_o", "teacher_a")}
    with pytest.raises(ValueError, match=message):
        ccd_loss(**logits | {"target": torch.zeros(2).long()} | changes)


def test_kernels_loads_torch_triton_and_numba_on_first_use_only():
    code = (
        "import sys, kernels\n"
        "assert not {'torch', 'triton', 'numba'} & set(sys.modules)\n"
        "kernels.jda.apply\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'cdc_loss'"):
        _ = kernels.cdc_loss


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_on_a_gpu_meets_float64(name):
    result = evaluate(CASES[name], "triton", "cuda")
    assert result["loss"].is_cuda
    assert_meets_float64(result, oracle(CASES[name]))


@pytest.mark.gpu
def test_auto_on_a_gpu_takes_float64_to_pytorch():
    case = random_case(10, 2)
    case["logits"] = [row.double() for row in case["logits"]]
    torch.testing.assert_close(evaluate(case, "auto", "cuda")["loss"].cpu(), oracle(case)["loss"], rtol=1e-12, atol=0)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    case = random_case(1000, 8)
    logits = [row.cuda().requires_grad_() for row in case["logits"]]
    target, valid = case["target"].cuda(), torch.ones(8, dtype=torch.bool, device="cuda")
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            ccd_loss(*logits, target, valid=valid, impl="triton").backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_replays_loss_and_gradient():
    case = random_case(1000, 8)
    students = [row.cuda().requires_grad_() for row in case["logits"][:2]]
    teacher, target = [row.cuda() for row in case["logits"][2:]], case["target"].cuda()

    def step():
        return torch.autograd.grad(ccd_loss(*students, *teacher, target, impl="triton"), students)

    expected = step()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        grads = step()
    graph.replay()
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
