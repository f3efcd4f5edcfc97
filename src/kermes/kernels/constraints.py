"""Projections of one morphology: monotonic, symmetric, compact.

A morphology is a (h, w) float32 array with its centre at the integer pixel (cy, cx).
"""

import numpy as np

from kermes.kernels.decorator import kernel


@kernel
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

    Among equals the centre wins, so that mirrored images give mirrored answers; with `first_wins` the first
    in row order does, as in scarlet lite.
    """
    h, w = morphology.shape
    best_y, best_x = cy, cx
    best = morphology[cy, cx]
    for y in range(max(cy - 1, 0), min(cy + 2, h)):
        for x in range(max(cx - 1, 0), min(cx + 2, w)):
            value = morphology[y, x]
            before = y < cy or (y == cy and x < cx)
            if value > best or (first_wins and value == best and before and (best_y == cy and best_x == cx)):
                best = value
                best_y, best_x = y, x
    return best_y, best_x


@kernel
def make_monotonic(morphology, cy, cx, weights):
    """Cap every pixel at the weighted mean of its neighbours closer to (cy, cx), in place.

    Pixels are visited in square rings and, within a ring, from the axes to the corners, so that every neighbour is
    done before it is needed: the same result as in order of radius. A neighbour outside the array counts as zero.
    Cost O(h w).
    """
    h, w = morphology.shape
    reach = max(max(cy, h - 1 - cy), max(cx, w - 1 - cx))
    for a in range(1, reach + 1):
        for b in range(a + 1):
            w0, w1, w2, w3 = weights[a, b, 0], weights[a, b, 1], weights[a, b, 2], weights[a, b, 3]
            for side in range(4):
                sign_a = 1 if side % 2 == 0 else -1
                vertical = side < 2
                if vertical:
                    y = cy + sign_a * a
                    if y < 0 or y >= h:
                        continue
                else:
                    x = cx + sign_a * a
                    if x < 0 or x >= w:
                        continue
                for turn in range(1 if b == 0 else 2):
                    sign_b = 1 if turn == 0 else -1
                    if vertical:
                        x = cx + sign_b * b
                        if x < 0 or x >= w:
                            continue
                        inner = y - sign_a
                        cap = w1 * morphology[inner, x]
                        if w0 > 0 and 0 <= x - sign_b < w:
                            cap += w0 * morphology[inner, x - sign_b]
                        if w2 > 0 and 0 <= x + sign_b < w:
                            cap += w2 * morphology[inner, x + sign_b]
                        if w3 > 0:
                            cap += w3 * morphology[y, x - sign_b]
                    else:
                        if b == a:
                            continue  # corners belong to the vertical sides
                        y = cy + sign_b * b
                        if y < 0 or y >= h:
                            continue
                        inner = x - sign_a
                        cap = w1 * morphology[y, inner]
                        if w0 > 0 and 0 <= y - sign_b < h:
                            cap += w0 * morphology[y - sign_b, inner]
                        if w2 > 0 and 0 <= y + sign_b < h:
                            cap += w2 * morphology[y + sign_b, inner]
                        if w3 > 0:
                            cap += w3 * morphology[y - sign_b, x]
                    if morphology[y, x] > cap:
                        morphology[y, x] = cap


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


@kernel
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
