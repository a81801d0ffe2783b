"""The one family of errors: what was got, what was expected, what to do, and at which site."""

from __future__ import annotations


class PliantError(ValueError):
    r"""A mistake that the caller can mend, told in full.

    Args:
        got: what was found, in a few words.
        expected: what would have been right.
        do: what to do about it.
        site: path of the site or module concerned, if there is one.

    >>> print(PliantError(got="threshold 'high'", expected="a number", do="pass a float", site="sites.0"))
    at site 'sites.0': got threshold 'high'; expected a number. Do: pass a float.
    """

    def __init__(self, *, got: str, expected: str, do: str, site: str | None = None) -> None:
        self.got, self.expected, self.do, self.site = got, expected, do, site
        where = f"at site {site!r}: " if site else ""
        super().__init__(f"{where}got {got}; expected {expected}. Do: {do}.")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.got, self.expected, self.do, self.site)


def _rebuild(got: str, expected: str, do: str, site: str | None) -> PliantError:
    return PliantError(got=got, expected=expected, do=do, site=site)
