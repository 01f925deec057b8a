"""A figure that notebooks show, whether or not matplotlib has been set up for them."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

_DPI = 110


class ShownFigure(Figure):
    """Matplotlib shows figures in a notebook that pyplot made; this one belongs to no window and shows itself."""

    def _repr_jpeg_(self) -> bytes:
        # not PNG: of photographs that is five times the bytes, and the notebook keeps them
        buffer = io.BytesIO()
        self.savefig(buffer, format="jpeg", dpi=_DPI, pil_kwargs={"quality": 85})
        return buffer.getvalue()
