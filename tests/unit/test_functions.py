"""What a few functions hold in memory, one formula, and a corner case of the steps.

tests/course/properties.py says what all of them must return, and test_assignment.py asks it of our
own code.
"""

import baselines
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import exprl
import judge_prompts


def test_a_step_is_never_a_bare_delimiter_even_if_one_token_ends_it():
    """The token "a\\n###" belongs to the later step, so the earlier step would be only "### "."""
    assert judge_prompts.split_steps(["### ", "a\n###", " b"]) == [(0, 3)]
    assert judge_prompts.split_steps(["### ", "x", " a\n###", " b"]) == [(0, 2), (2, 4)]


class LargestFloat32(TorchDispatchMode):
    """Watch every operation. `size` is the size of the largest float32 tensor that came out."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.size = max(self.size, x.numel())
        return out


def test_token_logprobs_never_hold_all_logits_in_float32(monkeypatch):
    B, T, V = 4, 6, 50
    logits = torch.randn(B, T, V).bfloat16().requires_grad_()
    monkeypatch.setattr(exprl, "completion_logits", lambda model, prompt_ids, ids: logits)
    ids = torch.randint(V, (B, T))
    kept = {}  # float32 tensors that wait for the backward pass

    def pack(x):
        if x.dtype == torch.float32:
            kept[x.data_ptr()] = x.numel()
        return x

    with LargestFloat32() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logp = exprl.token_logprobs(None, torch.zeros(1), ids, 0.8)
        logp.sum().backward()
    assert logp.dtype == torch.float32 and logits.grad.abs().sum() > 0
    assert seen.size < B * T * V


def test_reverse_kl_gradient_is_the_mean_of_the_sampled_form():
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 1, 1, 6)
    student.requires_grad_()
    [full] = torch.autograd.grad(baselines.reverse_kl(student, teacher, 0.7).sum(), student)
    logp, logq = ((x[0, 0] / 0.7).log_softmax(-1) for x in (student, teacher))
    mean = 0
    for v in range(6):  # every token that may be drawn, with its probability
        loss = (logp[v] - logq[v]).detach() * logp[v]
        [gradient] = torch.autograd.grad(loss, student, retain_graph=True)
        mean += logp[v].exp().item() * gradient
    assert full.abs().max() > 0.05
    torch.testing.assert_close(mean, full, atol=1e-5, rtol=1e-4)


def test_reverse_kl_never_holds_all_logits_in_float32():
    B, T, V = 4, 6, 50
    student, teacher = torch.randn(2, B, T, V).bfloat16()
    student.requires_grad_()
    with LargestFloat32() as seen:
        baselines.reverse_kl(student, teacher, 0.8).sum().backward()
    assert student.grad.abs().sum() > 0
    assert seen.size < B * T * V
