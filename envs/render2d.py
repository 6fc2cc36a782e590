"""Pictures of states, drawn on the host with Pillow."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxstack.envs.base import Kind

SIZE = 320
# Okabe and Ito's colours, told apart with any colour vision
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"]
PAPER, INK, SOFT = "#FFFFFF", "#333333", "#BBBBBB"


def captioned(frames: np.ndarray, lines: Sequence[str], kinds: Sequence[Kind] = ()) -> np.ndarray:
    """Add a line above each picture and a legend below it.

    Args:
        frames: [T, H, W, 3] uint8.
        lines: T texts, above.
        kinds: of the legend; none where it is empty.

    Returns:
        [T, H', W', 3] uint8, as wide as the longest line needs.
    """
    font, high, mark = ImageFont.load_default(12), 18, 16
    wide = lambda text: int(font.getlength(text)) + 12
    count, height, width, _ = frames.shape
    width = max(width, *map(wide, lines), *(wide(k.name) + mark for k in kinds))
    rows: list[list[tuple[int, Kind]]] = []
    at = width + 1
    for kind in kinds:
        room = wide(kind.name) + mark * (kind.shape != "note")
        if at + room > width:
            rows.append([])
            at = 4
        rows[-1].append((at, kind))
        at += room
    legend, draw = _canvas(width, high * len(rows))
    for i, row in enumerate(rows):
        for x, kind in row:
            y, colour = i * high, INK if kind.colour is None else COLOURS[kind.colour % len(COLOURS)]
            box = (x, y + 4, x + 10, y + 14)
            if kind.shape == "ring":
                draw.ellipse(box, outline=colour, width=3)
            elif kind.shape != "note":
                (draw.ellipse if kind.shape == "disc" else draw.rectangle)(box, fill=colour)
            draw.text((x + mark * (kind.shape != "note"), y + high // 2), kind.name, INK, font, anchor="lm")
    out = np.full((count, high + height + legend.height, width, 3), 255, np.uint8)
    left = (width - frames.shape[2]) // 2
    out[:, high : high + height, left : left + frames.shape[2]] = frames
    out[:, high + height :] = np.asarray(legend).reshape(legend.height, width, 3)
    for picture, text in zip(out, lines, strict=True):
        line, draw = _canvas(width, high)
        draw.text((6, high // 2), text, INK, font, anchor="lm")
        picture[:high] = np.asarray(line)
    return out


def particles(
    agents: np.ndarray,
    agent_radius: float | np.ndarray,
    landmarks: np.ndarray,
    landmark_radius: float | np.ndarray,
    extent: float = 1.3,
    groups: np.ndarray | None = None,
    landmark_groups: np.ndarray | None = None,
) -> np.ndarray:
    """[H, W, 3] uint8: agents as discs (coloured by `groups`, else each its own), landmarks as rings (coloured by
    `landmark_groups`, else dark); the view is [-extent, extent]^2 with y upwards, widened if something lies outside."""
    points = np.concatenate([agents.reshape(-1, 2), landmarks.reshape(-1, 2)])
    extent = max(extent, float(np.abs(points).max(initial=0.0)) + 0.1)
    image, draw = _canvas()
    groups = np.arange(len(agents)) if groups is None else groups
    for i, (p, r) in enumerate(zip(landmarks, np.broadcast_to(landmark_radius, len(landmarks)))):
        colour = INK if landmark_groups is None else COLOURS[int(landmark_groups[i]) % len(COLOURS)]
        draw.ellipse(_box(p, max(float(r), 0.02 * extent), extent), outline=colour, width=3)
    for i, (p, r) in enumerate(zip(agents, np.broadcast_to(agent_radius, len(agents)))):
        draw.ellipse(_box(p, max(float(r), 0.02 * extent), extent), fill=COLOURS[int(groups[i]) % len(COLOURS)])
    return np.asarray(image)


def battle(pos: np.ndarray, health: np.ndarray, allies: int, size: tuple[float, float]) -> np.ndarray:
    """[H, W, 3]: allies blue, enemies orange, a bar of health in [0, 1] over each living unit."""
    image, draw = _canvas()
    scale = SIZE / max(size)
    for i, (p, h) in enumerate(zip(pos, health)):
        if h <= 0:
            continue
        x, y, r = p[0] * scale, SIZE - p[1] * scale, 6
        draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[0] if i < allies else COLOURS[1])
        draw.rectangle((x - 8, y - 13, x + 8, y - 10), fill=SOFT)
        draw.rectangle((x - 8, y - 13, x - 8 + 16 * min(float(h), 1.0), y - 10), fill=COLOURS[2])
    return np.asarray(image)


def choices(actions: np.ndarray, num_actions: int) -> np.ndarray:
    """[H, W, 3]: a row for each agent, a column for each action, the chosen one filled."""
    image, draw = _canvas()
    cell = (SIZE - 20) / max(len(actions), num_actions)
    for i, a in enumerate(actions):
        for j in range(num_actions):
            box = (10 + j * cell, 10 + i * cell, 10 + (j + 1) * cell - 2, 10 + (i + 1) * cell - 2)
            draw.rectangle(box, fill=COLOURS[i % len(COLOURS)] if a == j else None, outline=SOFT)
    return np.asarray(image)


def grid(layers: np.ndarray, walls: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """[H, W, 3] of a grid observation [rows, cols, C]: each cell coloured by its highest active layer; `walls` are
    drawn at the right side of their cells (row, column)."""
    image, draw = _canvas()
    rows, cols, _ = layers.shape
    cell = SIZE / max(rows, cols)
    for y in range(rows):
        for x in range(cols):
            active = np.flatnonzero(layers[y, x])
            fill = COLOURS[int(active[-1]) % len(COLOURS)] if active.size else PAPER
            draw.rectangle((x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1), fill=fill, outline=SOFT)
    for y, x in walls:
        draw.line(((x + 1) * cell, y * cell, (x + 1) * cell, (y + 1) * cell), fill=INK, width=5)
    return np.asarray(image)


Piece = tuple[int, int, str, int]
"""Row, column, label and number of the colour."""


def board(
    height: int, width: int, discs: Sequence[Piece], boxes: Sequence[Piece] = (), marks: Sequence[Piece] = ()
) -> np.ndarray:
    """[H, W, 3] of a grid: agents are discs over boxes (foods, shelves, boulders), marks are cells with a coloured rim
    (goals)."""
    image, draw = _canvas()
    cell = SIZE / max(height, width)
    for row in range(height):
        for column in range(width):
            draw.rectangle(_cell(row, column, cell, 0), fill=PAPER, outline=SOFT)
    for row, column, _, colour in marks:
        draw.rectangle(_cell(row, column, cell, 1), outline=COLOURS[colour % len(COLOURS)], width=max(2, int(cell / 8)))
    for shape, pieces, gap in ((draw.rectangle, boxes, 0.18 * cell), (draw.ellipse, discs, 0.25 * cell)):
        for row, column, label, colour in pieces:
            shape(_cell(row, column, cell, gap), fill=COLOURS[colour % len(COLOURS)])
            middle = (column + 0.5) * cell, (row + 0.5) * cell
            draw.text(middle, label, fill=PAPER, anchor="mm", font_size=max(8, 0.4 * cell))
    return np.asarray(image)


def _cell(row: int, column: int, cell: float, gap: float) -> tuple[float, float, float, float]:
    return column * cell + gap, row * cell + gap, (column + 1) * cell - 1 - gap, (row + 1) * cell - 1 - gap


def cartpole(x: float, theta: float) -> np.ndarray:
    """[H, W, 3]: cart at x (track of +-2.4) with its pole at angle theta (radians from upright)."""
    image, draw = _canvas()
    scale, base = SIZE / 5.2, 0.7 * SIZE
    cx = SIZE / 2 + x * scale
    draw.line((0, base + 12, SIZE, base + 12), fill=SOFT, width=2)
    draw.rectangle((cx - 28, base - 12, cx + 28, base + 12), fill=INK)
    length = 1.0 * scale * 1.6
    draw.line(
        (cx, base - 12, cx + length * np.sin(theta), base - 12 - length * np.cos(theta)), fill=COLOURS[1], width=8
    )
    return np.asarray(image)


def side_view(links: np.ndarray) -> np.ndarray:
    """[H, W, 3]: x-z projection of link positions [L, 3], followed along x, over a ground line."""
    image, draw = _canvas()
    scale = SIZE / 4.0
    ground = 0.8 * SIZE
    draw.line((0, ground, SIZE, ground), fill=SOFT, width=2)
    centre = float(links[0, 0])
    points = [(SIZE / 2 + (float(p[0]) - centre) * scale, ground - float(p[2]) * scale) for p in links]
    draw.line(points, fill=SOFT, width=3)
    for i, (x, y) in enumerate(points):
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=COLOURS[i % len(COLOURS)])
    return np.asarray(image)


def _canvas(width: int = SIZE, height: int = SIZE) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def _box(p: np.ndarray, r: float, extent: float) -> tuple[float, float, float, float]:
    scale = SIZE / (2 * extent)
    x, y = (float(p[0]) + extent) * scale, SIZE - (float(p[1]) + extent) * scale
    return x - r * scale, y - r * scale, x + r * scale, y + r * scale
