"""Backwards of ops, of which there are no derivatives."""

import functools

import torch


class _Unpacked:
    """The context of a backward, whose saved tensors are unpacked once: activation checkpointing allows no more."""

    def __init__(self, ctx):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name):
        return getattr(self.ctx, name)


def once_differentiable(op: str):
    """A decorator for the backward of the op's autograd.Function: to differentiate its gradients raises RuntimeError.

    torch's own leaves second derivatives out without a word where the incoming gradient is a constant, as a sum's is,
    or where the caller asks for them with allow_unused.
    """
    message = (
        f"{op} has no second derivatives: use torch.func.hessian of the model, with fused_attn = False on its attention"
    )

    def decorate(backward):
        @functools.wraps(backward)
        def wrapped(ctx, *grads):
            recording = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # by create_graph
            ctx = _Unpacked(ctx) if recording else ctx
            with torch.no_grad():
                found = backward(ctx, *grads)
            if not recording:
                return found
            causes = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
            refuse = torch._C._functions.DelayedError(message.encode(), len(found) + len(causes))
            return refuse(*found, *causes)[: len(found)] if causes else found

        return wrapped

    return decorate
