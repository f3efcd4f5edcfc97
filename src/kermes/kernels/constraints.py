"""Projections of one morphology: monotonic, symmetric, compact.

A morphology is a (h, w) float32 array with its centre at the integer pixel (cy, cx).
"""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, inlined_kernel, kernel


@allocating_kernel
def monotonic_weights(radius):
    """Weights of the inner neighbours in the weighted monotonicity, "angle" form.

    Returns (radius + 1, radius + 1, 4) float32 for the octant a >= b >= 0 of offsets from the centre; the last
    axis holds the neighbours (a-1, b-1), (a-1, b), (a-1, b+1), (a, b-1), zero where they are not closer to the
    centre than (a, b). Weights are |cos| of the difference of the polar angles of pixel and neighbour, the centre
    counting as angle zero, and sum to one (weighted monotonicity of scarlet, Melchior et al. 2018, section 2.3).
    """
    weights = np.zeros((radius + 1, radius + 1, 4), dtype=np.float32)
    for a in range(1, radius + 1):
        for b in range(a + 1):
            angle = np.arctan2(float(b), float(a))
            total = 0.0
            values = np.zeros(4)
            for k in range(4):
                na = a if k == 3 else a - 1
                nb = b - 1 if k == 0 or k == 3 else (b if k == 1 else b + 1)
                if na * na + nb * nb >= a * a + b * b:
                    continue
                if na == 0 and nb == 0:
                    # Angle zero is not an angle at all here: on the axis the centre is the only neighbour, on the
                    # diagonal it weighs as much as the two others.
                    values[k] = 1.0 if b == 0 else np.cos(np.pi / 4)
                else:
                    values[k] = abs(np.cos(angle - np.arctan2(float(nb), float(na))))
                total += values[k]
            for k in range(4):
                weights[a, b, k] = values[k] / total
    return weights


@kernel
def brightest_near(morphology, cy, cx, first_wins):
    """Return the brightest pixel of the 3 x 3 around (cy, cx).

    When several are equally bright it is the centre, so that mirrored images give mirrored answers; with `first_wins`
    it is the first of them in row order, as in scarlet lite.
    """
    h, w = morphology.shape
    best_y, best_x = cy, cx
    best = morphology[cy, cx]
    n_equal = 1
    for y in range(max(cy - 1, 0), min(cy + 2, h)):
        for x in range(max(cx - 1, 0), min(cx + 2, w)):
            if y == cy and x == cx:
                continue
            value = morphology[y, x]
            before = y < cy or (y == cy and x < cx)
            if value > best or (first_wins and value == best and before and best_y == cy and best_x == cx):
                best = value
                best_y, best_x = y, x
                n_equal = 1
            elif value == best:
                n_equal += 1
    if n_equal > 1 and not first_wins:
        return cy, cx
    return best_y, best_x


@inlined_kernel
def cap_octant(flat, center, step_a, step_b, a, start, stop, limit, weights):
    """Cap the pixels center + a step_a + b step_b for start <= b < stop; see make_monotonic.

    `limit` is the first b outside the array.
    """
    ring = center + a * step_a
    inner = ring - step_a
    for b in range(start, stop):
        here = ring + b * step_b
        cap = weights[a, b, 1] * flat[inner + b * step_b]
        if b > 0:
            cap += weights[a, b, 0] * flat[inner + (b - 1) * step_b] + weights[a, b, 3] * flat[here - step_b]
        if b + 1 < limit:
            cap += weights[a, b, 2] * flat[inner + (b + 1) * step_b]
        flat[here] = min(flat[here], cap)


@inlined_kernel
def cap_axis(flat, center, step_a, step_b, a, room_before, room_after, weights):
    """Cap the pixel center + a step_a on an axis, whose neighbours may lie to either side of it."""
    inner = center + (a - 1) * step_a
    cap = weights[a, 0, 1] * flat[inner]
    if room_before:
        cap += weights[a, 0, 0] * flat[inner - step_b]
    if room_after:
        cap += weights[a, 0, 2] * flat[inner + step_b]
    here = inner + step_a
    flat[here] = min(flat[here], cap)


@kernel
def make_monotonic(morphology, cy, cx, weights):
    """Cap every pixel at the weighted mean of its neighbours closer to (cy, cx), in place.

    Pixels are visited in square rings and, within a ring, from the axes to the corners, so that every neighbour is
    done before it is needed: the same result as in order of radius. A neighbour outside the array counts as zero.
    Cost O(h w).
    """
    h, w = morphology.shape
    flat = morphology.reshape(h * w)
    center = cy * w + cx
    # Room from the centre to the edge, its own pixel included, in the directions +y, -y, +x, -x.
    room = (h - cy, cy + 1, w - cx, cx + 1)
    step = (w, -w, 1, -1)
    for a in range(1, max(max(room[0], room[1]), max(room[2], room[3]))):
        for along in range(4):
            if a < room[along]:
                across = 2 - 2 * (along // 2)
                cap_axis(flat, center, step[along], step[across], a, room[across + 1] > 1, room[across] > 1, weights)
        for along in range(4):
            if a < room[along]:
                for side in range(2):
                    across = 2 - 2 * (along // 2) + side
                    stop = min(a, room[across])
                    cap_octant(flat, center, step[along], step[across], a, 1, stop, room[across], weights)
        for along in range(2):  # the corners, once
            if a < room[along]:
                for across in range(2, 4):
                    if a < room[across]:
                        cap_octant(flat, center, step[along], step[across], a, a, a + 1, room[across], weights)


@kernel
def make_symmetric(morphology, cy, cx):
    """Replace each pixel by the smaller of itself and its mirror about (cy, cx), in place.

    Zero where the mirror lies outside.
    """
    h, w = morphology.shape
    for y in range(h):
        for x in range(w):
            my, mx = 2 * cy - y, 2 * cx - x
            if my < 0 or my >= h or mx < 0 or mx >= w:
                morphology[y, x] = 0.0
            elif morphology[my, mx] < morphology[y, x]:
                morphology[y, x] = morphology[my, mx]


@kernel
def walk_down(image, queue, first, last, sweep, settled, due, reached):
    """Accept every pixel that a path of falling values joins to the pixels queue[first:last]; see `monotone_mask`.

    Accepted pixels are appended to the queue, whose new length is returned. Cost O(pixels accepted).
    """
    h, w = image.shape
    while first < last:
        y, x = queue[first] // w, queue[first] % w
        first += 1
        for k in range(4):
            ny = y + (1 if k == 0 else (-1 if k == 1 else 0))
            nx = x + (1 if k == 2 else (-1 if k == 3 else 0))
            if ny < 0 or ny >= h or nx < 0 or nx >= w or settled[ny, nx] != 0:
                continue
            if 0 < image[ny, nx] <= image[y, x]:
                settled[ny, nx] = 1
                reached[ny, nx] = 1
                queue[last] = ny * w + nx
                last += 1
            elif due[ny, nx] == 0:
                due[ny, nx] = sweep + 1
    return last


@allocating_kernel
def monotone_mask(image, cy, cx, n_passes, reached):
    """Mark the pixels that a path of falling values joins to (cy, cx); repair orphans if asked.

    image (h, w), changed where orphans are repaired; reached (h, w) uint8 is written: 1 where accepted, 0
    elsewhere. A step goes to one of four neighbours whose value is positive and not higher. A pixel that was looked
    at and never accepted is an orphan.

    Each of the `n_passes` passes visits, row by row, the orphans known when it began, and each orphan once for good:
    from here on it is settled, like the accepted pixels, whatever becomes of it. In each of the four directions the
    two next pixels, near and far, are a falling pair if both lie in the image and far > near. Falling pairs that are
    settled predict 2 near - far. If the predictions sum to more than zero, the orphan takes their mean, is accepted,
    and the walk goes on from it at once. Otherwise it is refused: set to zero if all its falling pairs were settled
    (or it has none), left as it is if one was not, as the prediction was then incomplete.

    Returns the bounds (y0, y1, x0, x1), half open, of the accepted pixels. Cost O(h w) per pass.
    """
    h, w = image.shape
    reached[:] = 0
    queue = np.empty(h * w, dtype=np.int64)
    settled = np.zeros((h, w), dtype=np.uint8)
    due = np.zeros((h, w), dtype=np.int64)  # the pass that visits the orphan, counted from one
    queue[0] = cy * w + cx
    settled[cy, cx] = 1
    reached[cy, cx] = 1
    last = walk_down(image, queue, 0, 1, 0, settled, due, reached)
    for sweep in range(1, n_passes + 1):
        found = False
        for y in range(h):
            for x in range(w):
                if due[y, x] != sweep or settled[y, x] != 0:
                    continue
                settled[y, x] = 1
                found = True
                total, n_used, n_falling = 0.0, 0, 0
                for k in range(4):
                    dy = 1 if k == 0 else (-1 if k == 1 else 0)
                    dx = 1 if k == 2 else (-1 if k == 3 else 0)
                    fy, fx = y + 2 * dy, x + 2 * dx
                    if fy < 0 or fy >= h or fx < 0 or fx >= w:
                        continue
                    near, far = image[y + dy, x + dx], image[fy, fx]
                    if far > near:
                        n_falling += 1
                        if settled[y + dy, x + dx] != 0 and settled[fy, fx] != 0:
                            total += 2.0 * near - far
                            n_used += 1
                if total > 0:
                    image[y, x] = total / n_used
                    reached[y, x] = 1
                    queue[last] = y * w + x
                    last = walk_down(image, queue, last, last + 1, sweep, settled, due, reached)
                elif n_used == n_falling:
                    image[y, x] = 0.0
        if not found:
            break
    y0, y1, x0, x1 = cy, cy + 1, cx, cx + 1
    for i in range(last):
        y, x = queue[i] // w, queue[i] % w
        y0, y1 = min(y0, y), max(y1, y + 1)
        x0, x1 = min(x0, x), max(x1, x + 1)
    return y0, y1, x0, x1
