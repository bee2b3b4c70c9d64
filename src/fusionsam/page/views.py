"""What the demo page shows of a session: SVG marks, the picture to click on, sentences, files. No page library here."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fusionsam.data.images import write_png
from fusionsam.page.session import PairSession
from fusionsam.types import InputError, Prompts

PREVIEW = 1280
"""Longest side of a picture on the page; the files to download have every pixel."""

# A press that moves less than 6 screen pixels is a point. A finger drags boxes only with the box tool, so that the page
# still scrolls; the mouse's right button is off whatever the tool.
STAGE_JS = """
let start = null;
const place = (e) => {
  const svg = element.querySelector('.stage svg'), r = svg.getBoundingClientRect(), v = svg.viewBox.baseVal;
  const to = (at, low, span, size) => Math.min(size - 1, Math.max(0, (at - low) / span * size - 0.5));
  return [to(e.clientX, r.left, r.width, v.width), to(e.clientY, r.top, r.height, v.height)];
};
const boxTool = () => document.querySelector('#tool label:nth-of-type(3) input')?.checked;
element.addEventListener('contextmenu', (e) => { if (e.target.closest('.stage')) e.preventDefault(); });
element.addEventListener('dragstart', (e) => e.preventDefault());
element.addEventListener('pointerdown', (e) => {
  if (!e.target.closest('.stage') || (e.button !== 0 && e.button !== 2)) return;
  start = {at: place(e), x: e.clientX, y: e.clientY, off: e.button === 2};
  if (e.pointerType === 'mouse' || boxTool()) element.setPointerCapture(e.pointerId);
});
const far = (e) => Math.hypot(e.clientX - start.x, e.clientY - start.y) >= 6;
element.addEventListener('pointermove', (e) => {
  if (!start || start.off || !far(e)) return;
  const rubber = element.querySelector('.rubber'), b = place(e), a = start.at;
  if (!rubber) return;
  rubber.setAttribute('x', Math.min(a[0], b[0])); rubber.setAttribute('y', Math.min(a[1], b[1]));
  rubber.setAttribute('width', Math.abs(a[0] - b[0])); rubber.setAttribute('height', Math.abs(a[1] - b[1]));
});
element.addEventListener('pointercancel', () => { start = null; });
element.addEventListener('pointerup', (e) => {
  if (!start) return;
  const s = start, at = place(e), box = !s.off && far(e);
  start = null;
  if (box) trigger('click', {box: [...s.at, ...at]});
  else if (!boxTool() || s.off) trigger('click', {point: s.at, off: s.off});
});
"""

CSS = """
.stage {position: relative; line-height: 0; touch-action: manipulation; cursor: crosshair; user-select: none}
body:has(#tool label:nth-of-type(3) input:checked) .stage {touch-action: none}
body:has(#show-prompts input:not(:checked)) .stage :is(circle, .box) {display: none}
.stage img {width: 100%; height: auto; display: block}
.stage svg {position: absolute; inset: 0; width: 100%; height: 100%}
.stage .rubber {fill: none; stroke: #ffe600; stroke-width: 2; vector-effect: non-scaling-stroke}
#status {font-size: 15px; min-height: 1.6em}
#status .error {color: #b00020; font-weight: 600; overflow-wrap: anywhere}
.dark #status .error {color: #ff8a80}
#pictures {display: grid !important; grid-template-columns: 3fr 3fr 4fr 4fr; gap: 12px; align-items: start}
#pictures > * {min-width: 0 !important; width: 100%}
.wait {padding: 5em 1em; text-align: center; line-height: 1.4}
#align-pictures {display: grid !important; gap: 12px; align-items: start;
  grid-template-columns: repeat(3, minmax(0, 1fr))}
#align-pictures > * {min-width: 0 !important; width: 100%}
#align-pictures > *, #fused {position: relative; padding: 0 !important; border: 1px solid var(--border-color-primary);
  border-radius: 4px}
#align-pictures > * > *, #align-pictures .html-container, #fused > *, #fused .html-container {padding: 0 !important}
#align-edges:focus-within {outline: 2px solid var(--color-accent)}
#align-edges .stage {cursor: move}
#align-status .error {color: #b00020; font-weight: 600; overflow-wrap: anywhere}
.dark #align-status .error {color: #ff8a80}
.title {position: absolute; z-index: 1; top: 0; left: 0; padding: 2px 10px; font-size: 13px; line-height: 1.6;
  color: var(--block-label-text-color); background: var(--block-label-background-fill); pointer-events: none}
@media (max-width: 1000px) {
  #pictures {grid-template-columns: repeat(2, minmax(0, 1fr))}
  #align-pictures {grid-template-columns: minmax(0, 1fr)}
}
@media (max-width: 640px) {
  #fused, #segmentation {grid-column: 1 / -1}
  .gradio-container {padding: 8px !important}
}
footer {display: none !important}
"""


# -- pictures ----------------------------------------------------------------------------------------------------


def preview(image: Image.Image) -> Image.Image:
    """At most PREVIEW pixels a side."""
    small = image.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    return small


def marks(prompts: Prompts, size: tuple[int, int]) -> str:
    """Points and boxes as SVG: green on the object, red off it, boxes yellow, dashed where the model's own."""
    unit = max(size) / 110
    dashed = "" if prompts.source == "user" else 'stroke-dasharray="6 4"'
    parts = []
    for x0, y0, x1, y1 in [] if prompts.boxes is None else prompts.boxes[0].tolist():
        place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0 + 1:.1f}" height="{y1 - y0 + 1:.1f}"'
        line = 'fill="none" vector-effect="non-scaling-stroke"'
        parts.append(f'<rect class="box" {place} {line} stroke="#ffe600" stroke-width="2" {dashed}/>')
    if prompts.points is not None and prompts.point_labels is not None:
        for (x, y), label in zip(prompts.points[0].tolist(), prompts.point_labels[0].tolist(), strict=True):
            if label >= 0:
                kind, color = ("on", "#00dc46") if label else ("off", "#f02828")
                place = f'cx="{x + 0.5:.1f}" cy="{y + 0.5:.1f}" r="{unit:.1f}"'
                parts.append(
                    f'<circle class="{kind}" {place} fill="{color}" stroke="#fff" stroke-width="{unit / 2:.1f}"/>'
                )
    return "".join(parts)


def numbered(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> str:
    """Corresponding points as SVG: crosses with their numbers, in a picture of (H, W)."""
    unit, parts = max(size) / 60, []
    for number, (x, y) in enumerate(points, 1):
        x, y = x + 0.5, y + 0.5
        cross = f"M{x - unit:.1f} {y:.1f}h{2 * unit:.1f}M{x:.1f} {y - unit:.1f}v{2 * unit:.1f}"
        for color, width in (("#000", 4), ("#ffe600", 2)):
            parts.append(
                f'<path d="{cross}" fill="none" stroke="{color}" stroke-width="{width}" '
                'vector-effect="non-scaling-stroke"/>'
            )
        parts.append(
            f'<text class="point" x="{x + unit:.1f}" y="{y - unit / 2:.1f}" font-size="{2.4 * unit:.1f}" '
            f'fill="#ffe600" stroke="#000" stroke-width="{unit / 3:.1f}" paint-order="stroke">{number}</text>'
        )
    return "".join(parts)


def waiting() -> str:
    """What stands in the fused picture's place before there is one."""
    return '<div class="title">Fused</div><div class="wait">Drop a pair above, or take a built-in one.</div>'


def stage(image: Image.Image, size: tuple[int, int], drawn: str, title: str = "Fused") -> str:
    """A picture that is clicked on, as HTML; its SVG has the picture's own pixels (H, W) as units."""
    file = io.BytesIO()
    preview(image).save(file, "JPEG", quality=92)
    source = base64.b64encode(file.getvalue()).decode()
    return (
        f'<div class="title">{title}</div><div class="stage"><img alt="{title.lower()} picture" draggable="false" '
        f'src="data:image/jpeg;base64,{source}"><svg viewBox="0 0 {size[1]} {size[0]}">{drawn}'
        '<rect class="rubber"/></svg></div>'
    )


def shown(image: Tensor) -> Image.Image:
    """An input image, uint8 (3,H,W) or (1,H,W), for the page."""
    pixels = image.permute(1, 2, 0).numpy()
    return preview(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def swatches(palette: list[tuple[int, int, int]]) -> str:
    """CSS that gives each class's check box its colour; class 0 has none."""
    return "".join(
        f"#classes label:nth-of-type({index}) {{border-left: 14px solid rgb{color}}}"
        for index, color in enumerate(palette[1:], start=1)
    )


# -- words -------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def describe(session: PairSession) -> str:
    """The lines below the pictures: what was used, how long it took, what the prompts did, what was guessed."""
    now = session.now
    parts = [f"{session.size[1]}x{session.size[0]} pixels"]
    if session.alignment:
        parts.append(f"aligned by the rig: infrared covers {session.alignment['covered']:.0%} of the visible picture")
    lost = session.lost()
    if lost is not None:
        parts.append(f"with the {session.use} image alone, {lost:.1f} % of the pixels get another class")
    elif session.visible is None or session.infrared is None:
        parts.append(f"from the {'infrared' if session.visible is None else 'visible'} image alone")
    if session.prompted:
        clicks = f"{_count(len(session.points), 'point')} and {_count(len(session.boxes), 'box', 'boxes')} of yours"
        mask = session.mask()
        names = [now.classes[index] for index in np.unique(now.labels[mask])]
        found = f"mask: {', '.join(names)}, {100 * mask.mean():.2f} % of the picture"
        nothing = "mask: empty (no known class there; pick something that has a colour)"
        parts += [
            clicks,
            found if names else nothing,
            f"they changed the class of {session.moved():.2f} % of the pixels",
        ]
    else:
        own = now.prompts
        points = 0 if own.point_labels is None else int((own.point_labels >= 0).sum())
        boxes = 0 if own.boxes is None else own.boxes.shape[1]
        parts.append(f"the model gave itself {_count(points, 'point')} and {_count(boxes, 'box', 'boxes')}")
    parts.append(f"{now.seconds:.2f} s")
    notices = [f"<br>note: {html.escape(text)}" for text in session.input.get("notices", [])]
    return f"<span>{' · '.join(parts)}{''.join(notices)}</span>"


def complaint(error: InputError) -> str:
    """One sentence as HTML; file names come from outside."""
    text = html.escape(" ".join(str(error).split()))
    return f'<span class="error" role="alert">{text}</span>'


def write_files(session: PairSession, folder: Path) -> list[str]:
    """What can be downloaded, in full size: fused, labels, overlay and (after clicks) mask as PNG, summary as JSON."""
    now = session.now
    pictures = {"fused": now.fused, "labels": now.labels, "overlay": np.asarray(now.overlay())}
    if session.prompted:
        pictures["mask"] = session.mask().astype(np.uint8) * 255
    for name, picture in pictures.items():
        write_png(folder / f"{name}.png", picture)
    read = {name: told for name in ("alignment", "input") if (told := getattr(session, name))}
    (folder / "summary.json").write_text(json.dumps({**read, **now.summary()}, indent=1) + "\n")
    return [str(folder / f"{name}.png") for name in pictures] + [str(folder / "summary.json")]
