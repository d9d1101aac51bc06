"""The models among the arguments of graded functions, and gradients through the functions.

The grader and the program in the sandbox both use this file.
"""

import os
from types import SimpleNamespace


def preload():
    """Import what takes seconds, so that it does not count as the time of a function."""
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401


if os.path.exists("exprl.py"):  # in the sandbox, if there is a function that needs it
    preload()


def bigram(content):
    """Return a model whose logits depend only on the current token: row t of its table follows t.

    Its cache remembers how many rows and tokens the model has read, and nothing else. A cache with
    another number of rows than `input_ids` is an error, as it is for a transformer.
    """
    import torch
    from transformers import DynamicCache

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.tensor(content))

        def __repr__(self):
            return f"a model whose logits after token t are row t of {self.table.tolist()}"

        def forward(self, input_ids, cache=None, use_cache=None, logits_to_keep=0, **_):
            cache = DynamicCache() if cache is None else cache
            read = torch.zeros(*input_ids.shape, 1)[:, None]  # (B, 1, T, 1) for a head of size 1
            cache.update(read, read, 0)
            return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:], cache=cache)

    return Bigram()


def transformer(name, seed):
    """Return a random transformer. Llama's positions are relative, GPT-2's are absolute."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "Llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes, **heads))
    else:
        sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=16, **sizes, **ends))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def make_model(name, content):
    """Return a bigram model with this table (a list of rows), or a transformer of this seed.

    Its attribute `spec` holds these two arguments, so that another process can make it again.
    """
    if "bigram" in name:
        model = bigram(content)
        model = model.bfloat16() if "bfloat16" in name else model
    else:
        model = transformer(name, content)
    model.spec = [name, content]
    return model.eval()


def gradients(out, args):
    """Return the gradients of the sum of `out`, each element weighted differently.

    They are taken by the tensors among the arguments that require gradients, and by the parameters
    of a model among the arguments.
    """
    import torch

    leaves = [arg for arg in args if getattr(arg, "requires_grad", False)]
    for arg in args:
        leaves += arg.parameters() if isinstance(arg, torch.nn.Module) else []
    total = (out * torch.linspace(2, -1, out.numel()).view(out.shape)).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
