"""Arguments of the public calls: what is taken, and the sentence that refuses the rest."""

import math

from ._core import InvalidArgument


def texts(value, what, count=None):
    """A list of strings; one string stands for all `count`."""
    found = [value] * (count or 1) if isinstance(value, str) else value
    if (not isinstance(found, list | tuple) or not found
            or not all(isinstance(t, str) for t in found)):
        raise InvalidArgument(f"{what}: found {value!r:.100}, expected a string or a list of them")
    for text in found:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"{what}: found {text!r:.100}, not Unicode: {error.reason} at "
                                  f"character {error.start}") from error
    if count is not None and len(found) != count:
        raise InvalidArgument(f"{what}: found {len(found)} of them, expected {count}, one for each "
                              "prompt")
    return list(found)


def is_given(text):
    """Whether a prompt that may be left out is there: diffusers takes "" for None."""
    return text is not None and not (isinstance(text, str) and not text)


def integer(value, what, least, most):
    try:
        if isinstance(value, bool):
            raise TypeError
        result = int(value.__index__())
    except (AttributeError, TypeError) as error:
        raise InvalidArgument(f"{what}: found {value!r:.100}, expected an integer") from error
    if not least <= result <= most:
        raise InvalidArgument(f"{what}: found {result}, expected {least} to {most}")
    return result


def number(value, what):
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{what}: found {value!r:.100}, expected a number") from error
    if not math.isfinite(result):
        raise InvalidArgument(f"{what}: found {result}, expected a finite number")
    return result
