"""Digits as a hand draws them: strokes of points (x, y) in sides of the pad."""

import math

Stroke = list[tuple[float, float]]


def arc(x: float, y: float, width: float, height: float, start: float, stop: float, points: int = 24) -> Stroke:
    """Part of an ellipse about (x, y), from one angle to another in degrees; 0 is right and 90 is down."""
    angles = (math.radians(start + (stop - start) * i / (points - 1)) for i in range(points))
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


DIGITS: dict[int, list[Stroke]] = {
    0: [arc(0.5, 0.5, 0.18, 0.3, -90, 270, 40)],
    1: [[(0.55, 0.2), (0.5, 0.5), (0.46, 0.8)]],
    2: [[*arc(0.5, 0.37, 0.18, 0.17, -170, 30), (0.33, 0.78), (0.5, 0.76), (0.7, 0.79)]],
    3: [[*arc(0.48, 0.35, 0.17, 0.14, -160, 90), *arc(0.48, 0.64, 0.2, 0.16, -90, 150)]],
    4: [[(0.4, 0.2), (0.32, 0.52), (0.68, 0.5)], [(0.6, 0.24), (0.57, 0.82)]],
    5: [[(0.38, 0.22), (0.36, 0.47), *arc(0.46, 0.62, 0.18, 0.17, -110, 140)], [(0.38, 0.22), (0.66, 0.2)]],
    6: [[(0.6, 0.2), (0.45, 0.36), *arc(0.5, 0.63, 0.16, 0.16, -170, 190, 36)]],
    7: [[(0.32, 0.25), (0.68, 0.24), (0.55, 0.5), (0.45, 0.8)]],
    8: [[*arc(0.5, 0.35, 0.14, 0.14, 90, -270, 30), *arc(0.5, 0.65, 0.17, 0.16, -90, 270, 30)]],
    9: [[*arc(0.48, 0.37, 0.15, 0.15, 0, 360, 30), (0.62, 0.5), (0.58, 0.82)]],
}
