"""Makes Triton's interpreter quick enough for tests, most of whose tensors are tiny: what it would make anew for every
operation is made once. None of it changes what a kernel computes."""

from __future__ import annotations

import functools
import math
from typing import Any

from triton import language
from triton.language import core
from triton.runtime import interpreter


def quicken() -> None:
    """For this process. AttributeError: this Triton is built otherwise."""
    interpreter._patch_lang = _replace_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _number_once(interpreter._get_np_dtype)
    core.block_type.__init__ = _describe_once(core.block_type.__init__)
    core.tensor.__init__ = _shape_once
    # It would compute each sum and product of 32 bits once more in 64, to see whether it fits: here they all do.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _replace_once(replace: Any) -> Any:
    """The functions of triton.language, which are replaced for each launch and for every helper that a kernel calls."""
    scopes: dict[Any, Any] = {}

    @functools.cache
    def modules_of(function: Any) -> tuple[Any, ...]:
        return tuple(m for m in (language, core) if any(v is m for v in function.__globals__.values()))

    def replace_once(function: Any) -> Any:
        modules = modules_of(function)
        if modules not in scopes:
            scopes[modules] = replace(function)
            scopes[modules].restore = lambda: None
        return scopes[modules]

    return replace_once


def _number_once(number: Any) -> Any:
    """NumPy's dtypes for Triton's."""
    cached = functools.cache(number)
    return lambda dtype: cached(language.uint64 if dtype.scalar.is_ptr() else dtype.scalar)


def _describe_once(describe: Any) -> Any:
    """Types of tensors. They get what `_shape_once` gives to tensors, too."""
    known: dict[Any, Any] = {}

    def describe_once(self: Any, element: Any, shape: Any) -> None:
        key = (element.name, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            describe(self, element, shape)
            known[key] = {**self.__dict__, "shape_of_tensor": _shape_of(self.shape)}
        self.__dict__.update(known[key])

    return describe_once


def _shape_once(self: Any, handle: Any, type: Any) -> None:
    """A tensor, whose shape Triton keeps as objects of its own."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.shape_of_tensor if type.is_block() else _SCALAR


def _shape_of(sizes: Any) -> tuple[Any, Any]:
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


_SCALAR = _shape_of(())
