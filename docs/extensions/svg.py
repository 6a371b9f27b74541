"""A sheet to draw on: boxes, words and arrows as SVG, in the colours of the page or of their own.

Colours are CSS variables, which static/bncpu.css sets for light and dark pages; by itself a file
has the light ones. What is drawn is drawings.py's and speed.py's affair.
"""

from html import escape

# By role; the eight series are Okabe & Ito's, told apart by colour-blind readers too.
COLORS = {
    "ink": "#222222",
    "faint": "#767676",
    "line": "#b0b0b0",
    "box": "#f3f5f7",
    "accent": "#0072b2",
    "blue": "#0072b2",
    "sky": "#56b4e9",
    "green": "#009e73",
    "orange": "#e69f00",
    "red": "#d55e00",
    "pink": "#cc79a7",
    "grey": "#999999",
}
FONT = "font-family:system-ui,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"
MONO = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"


def color(role):
    return f"var(--drawing-{role},{COLORS[role]})"


class Sheet:
    """A drawing of a given size in pixels; `title` is what a screen reader says of it."""

    def __init__(self, width, height, title):
        self.width, self.height, self.title = width, height, title
        self.parts = []

    def box(self, x, y, width, height, fill="box", line="line", *, round_=4, opacity=1):
        stroke = f"stroke:{color(line)}" if line else "stroke:none"
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="{round_}" style="fill:{color(fill)};fill-opacity:{opacity};{stroke}"/>'
        )

    def text(self, x, y, words, size=13, role="ink", *, anchor="start", bold=False, mono=False):
        weight = "font-weight:600;" if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
            f'style="{MONO if mono else FONT};font-size:{size}px;{weight}fill:{color(role)}">'
            f"{escape(words)}</text>"
        )

    def line(self, points, role="line", width=1.2, *, arrow=False, dashed=False):
        """Draw a line through points (x, y); an arrow head at its end if asked for."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = "stroke-dasharray:4 3;" if dashed else ""
        self.parts.append(
            f'<polyline points="{joined}" '
            f'style="fill:none;stroke:{color(role)};stroke-width:{width};{dashes}"/>'
        )
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            left, right = (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx), (0, 0)
            right = (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx)
            head = " ".join(f"{a:.1f},{b:.1f}" for a, b in ((x, y), left, right))
            self.parts.append(f'<polygon points="{head}" style="fill:{color(role)}"/>')

    def svg(self, *, background=False):
        """Return the drawing; a file of its own wants a background."""
        title = escape(self.title, quote=True)
        under = '<rect width="100%" height="100%" fill="white"/>\n' if background else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" role="img" '
            f'aria-label="{title}" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}">\n<title>{title}</title>\n'
            + under
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )
