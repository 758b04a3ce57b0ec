"""TorchScript, which is refused wherever it meets our code."""


def refuse_script(*_):
    """What torch.jit.script calls of an object that has it as `__prepare_scriptable__`. Raises NotImplementedError."""
    raise NotImplementedError("TorchScript is deprecated and not supported: use torch.compile or torch.export")
