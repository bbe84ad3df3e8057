"""
Pictures of walks: for each a page (.png: the instruction, the map, eight frames) and a film (.gif).

evaluate.py --pictures N calls save_pictures() for N of the walks. On the map
blue is the walk, green the ground truth and the success radius, orange (dashed) the last plan. An
instruction whose script no installed font can draw goes into a .txt file instead.

Run it   python evaluate.py --split val_unseen --pictures 6
Writes   <results folder>/pictures/<episode_id>.png, .gif, and .txt if a font is missing
"""
from __future__ import annotations

import functools
import math
import os
import re
import sys
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from cli import write_text
from reward import FORWARD, LEFT, RIGHT
from world.robots import yaw_of

if TYPE_CHECKING:
    from evaluate import EpisodeState

BLUE, GREEN, ORANGE, WHITE = (30, 90, 220), (30, 150, 60), (240, 130, 0), (255, 255, 255)


# ---------------------------------------------------------------- the map


def planned_path(state: dict, plan: list[int], robot: dict) -> list[list[float]]:
    """Where a plan leads if nothing is in its way: [[x, y, z], ..], metres, the start included.

    >>> state = {"position": [0, 0, 0], "rotation": [0, 0, 0, 1]}               # it faces -z
    >>> planned_path(state, [LEFT, FORWARD], {"turn_deg": 90, "forward_m": 0.25})[-1]
    [-0.25, 0, -0.0]
    """
    x, y, z = state["position"]
    heading, points = yaw_of(state["rotation"]), [[x, y, z]]
    for action in plan:
        heading += {LEFT: 1, RIGHT: -1}.get(action, 0) * math.radians(robot["turn_deg"])
        if action == FORWARD:
            x -= robot["forward_m"] * math.sin(heading)
            z -= robot["forward_m"] * math.cos(heading)
            points.append([round(x, 6), y, round(z, 6)])
    return points


def crop_map(walk: EpisodeState, reference: list | None,
             size: int) -> tuple[Image.Image, tuple[float, float, float]]:
    """The scene from above around a walk, size x size pixels -> image, and (x, z, side) in metres:
    its left upper corner and its width."""
    goals = [goal["position"] for goal in walk.episode["goals"][:1]]        # none in a test split
    x, _, z = np.array([*(state["position"] for state in walk.states), *(reference or ()),
                        *goals]).T
    side = max(np.ptp(x), np.ptp(z)) + 3
    left, top = (x.min() + x.max() - side) / 2, (z.min() + z.max() - side) / 2
    image, (x0, z0, x1, z1) = Image.fromarray(np.array(walk.map["image"])), walk.map["bounds"]
    box = [(left - x0) / (x1 - x0), (top - z0) / (z1 - z0),
           (left + side - x0) / (x1 - x0), (top + side - z0) / (z1 - z0)]
    image = image.transform((size, size), Image.Transform.EXTENT, fillcolor=WHITE, data=[
        share * pixels for share, pixels in zip(box, image.size * 2)])
    return image, (float(left), float(top), float(side))


def draw_map(walk: EpisodeState, reference: list | None, robot: dict, radius: float, upto: int,
             size: int) -> Image.Image:
    """The scene from above, size x size pixels around the walk, which is drawn up to pose `upto`,
    with the latest plan at that pose."""
    image, (left, top, side) = crop_map(walk, reference, size)
    positions = [state["position"] for state in walk.states]
    goals = [goal["position"] for goal in walk.episode["goals"][:1]]        # none in a test split
    draw = ImageDraw.Draw(image)

    def pixels(points):
        return [((x - left) * size / side, (z - top) * size / side) for x, _, z in points]

    def circle(point, r, colour, fill=None):
        (x, y), = pixels([point])
        draw.ellipse([x - r, y - r, x + r, y + r], fill, colour, 2)

    draw.line(pixels(reference or positions[:1] * 2), GREEN, 5)
    draw.line(pixels(positions[:upto + 1]), BLUE, 3)
    made = [one for one in walk.decisions if one.t <= upto and FORWARD in one.plan]
    for decision in made[-1:]:
        state = walk.states[decision.t]
        ahead = np.array(pixels(planned_path(state, decision.plan, robot)))
        for a, b in zip(ahead, ahead[1:]):
            draw.line([*a, *(a + 0.6 * (b - a))], ORANGE, 3)
    for goal in goals:
        circle(goal, radius * size / side, GREEN)
        circle(goal, 4, GREEN, GREEN)
    circle(positions[0], 5, BLUE, WHITE)
    circle(positions[upto], 4, BLUE, BLUE)
    return image


# ---------------------------------------------------------------- fonts


@functools.lru_cache(None)
def characters_of(path: str) -> frozenset[int]:
    """The code points that a font file can draw; none if it is unreadable."""
    from fontTools.ttLib import TTFont
    try:
        return frozenset(TTFont(path, fontNumber=0, lazy=True).getBestCmap() or ())
    except Exception:                      # a damaged font: try the next
        return frozenset()


@functools.lru_cache(None)
def installed_fonts() -> list[str]:
    """Font files to try, regular ones with wide coverage first."""
    from matplotlib import font_manager, get_data_path
    found = sorted(font_manager.findSystemFonts(), key=lambda path: (
        "regular" not in path.lower(), "noto" not in path.lower(), path))
    return [os.path.join(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), *found]


@functools.lru_cache(None)
def font_for(word: str, size: int = 13) -> ImageFont.ImageFont | None:
    """A font that has all characters of a word, or None. Pillow's own has ASCII; Indic scripts also
    need libraqm, which orders and joins their signs."""
    if word.isascii():
        return ImageFont.load_default(size)
    if any("\u0900" <= char <= "\u0dff" for char in word) and not features.check("raqm"):
        return None
    wanted = set(map(ord, word)) - {0x200c, 0x200d}                  # joiners are never drawn
    path = next((path for path in installed_fonts() if wanted <= characters_of(path)), None)
    return path and ImageFont.truetype(path, size)


def lay_out(text: str, width: int) -> tuple[list, int] | None:
    """A text as [(x, line, piece of a word, font)] in lines of at most `width` pixels, and the
    number of lines; None if no installed font has the characters of a piece. A word is cut where
    ASCII meets other characters, since many fonts of a script have no Latin letters."""
    placed, x, line, space = [], 0, 0, font_for(" ").getlength(" ")
    for word in text.split():
        pieces = re.findall(r"[!-~]+|[^!-~]+", word)
        fonts = list(map(font_for, pieces))
        if None in fonts:
            return None
        lengths = [font.getlength(piece) for font, piece in zip(fonts, pieces)]
        if x and x + sum(lengths) > width:
            x, line = 0, line + 1
        for piece, font, length in zip(pieces, fonts, lengths):
            placed.append((x, line, piece, font))
            x += length
        x += space
    return placed, line + 1


@functools.lru_cache(None)
def warn_no_font(language: str):
    """Print a warning, once for each language."""
    print(f"pictures: no installed font has the characters of the {language} instructions (or "
          "Pillow has no libraqm), so they are written to .txt files in the same folder; on Debian "
          "and Ubuntu: apt-get install fonts-noto-core", file=sys.stderr, flush=True)


def instruction_lines(walk: EpisodeState, width: int) -> tuple[list, int]:
    """lay_out() of the instruction, or of a note that it cannot be drawn."""
    found = lay_out(walk.instruction, width)
    if found is None:
        language = walk.episode["instruction"].get("language") or "other"
        warn_no_font(language)
        found = lay_out(f"[{language} instruction: see {walk.name}.txt]", width)
    return found


# ---------------------------------------------------------------- the page, and the film


def compose_page(walk: EpisodeState, title: str, make_map, poses: list[int], upto: int,
                 size: int = 200) -> Image.Image:
    """One page: title, instruction, the map up to pose `upto`, the frames seen at `poses`."""
    font = ImageFont.load_default(13)
    columns = min(4, len(poses))
    side = math.ceil(len(poses) / columns) * (size + 20)
    width = side + 8 + columns * (size + 6)
    pieces, lines = instruction_lines(walk, width - 12)
    top = 12 + 18 * (lines + 1)
    page = Image.new("RGB", (width, top + side), WHITE)
    draw = ImageDraw.Draw(page)
    draw.text((6, 17), title, (0, 0, 0), font, anchor="ls")
    for x, line, piece, its_font in pieces:                   # ls: all fonts on one baseline
        draw.text((6 + x, 17 + 18 * (line + 1)), piece, (0, 0, 0), its_font, anchor="ls")
    page.paste(make_map(upto, side), (0, top))
    for i, t in enumerate(poses):
        x, y = side + 8 + i % columns * (size + 6), top + i // columns * (size + 20)
        frame = Image.fromarray(np.array(walk.video_frames[t]))
        smooth = Image.Resampling.NEAREST if frame.width < size else Image.Resampling.BICUBIC
        page.paste(frame.resize((size, round(size * frame.height / frame.width)), smooth), (x, y))
        plans = [decision.plan for decision in walk.decisions if decision.t <= t]
        text = " plan " + "".join("DABC"[action] for action in plans[-1]) if plans else ""
        draw.text((x, y + size), f"step {t}{text}", (90, 90, 90), font)
    return page


def page_title(walk: EpisodeState, row: dict) -> str:
    if "success" not in row:
        return f"{row['end']}: episode {walk.name}, {row['steps']} steps"
    outcome, metres = "success" if row["success"] else "failure", row["distance_to_goal"]
    return f"{outcome}: episode {walk.name}, {row['steps']} steps, " + (
        "no path to the goal is known" if metres is None else f"{metres:.2f} m from the goal")


def save_pictures(walk: EpisodeState, row: dict, reference: list | None, robot: dict, radius: float,
                  folder: str):
    """<folder>/<episode_id>.png, the map and eight frames, and .gif, a page per pose."""
    os.makedirs(folder, exist_ok=True)
    make_map = functools.partial(draw_map, walk, reference, robot, radius)
    path, last = os.path.join(folder, walk.name), len(walk.video_frames) - 1
    if lay_out(walk.instruction, 1000) is None:
        write_text(path + ".txt", walk.instruction + "\n")
    title, poses = page_title(walk, row), sorted({round(i * last / 7) for i in range(8)})
    compose_page(walk, title, make_map, poses, last).save(path + ".png")
    film = [compose_page(walk, title, make_map, [t], t, size=224) for t in range(last + 1)]
    film[0].save(path + ".gif", save_all=True, append_images=film[1:], duration=150, loop=0)
