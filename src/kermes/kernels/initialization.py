"""First shapes of sources: symmetric, monotonic pieces of a detection image."""

import numpy as np

from kermes.kernels.decorator import kernel


@kernel
def signal_to_noise(images, weights, psfs, centers):
    """Signal-to-noise of a point source at every centre, all bands together.

    images, weights (B, H, W), psfs (B, P, Q), centers (K, 2). The matched filter sum(I P) / sqrt(sum(P^2 V)) over
    the usable pixels of the stamp; zero where none is usable. Cost O(K B P Q).
    """
    n_bands, h, w = images.shape
    p, q = psfs.shape[1:]
    out = np.zeros(len(centers))
    for k in range(len(centers)):
        cy, cx = centers[k]
        signal, noise2 = 0.0, 0.0
        for b in range(n_bands):
            for y in range(max(cy - p // 2, 0), min(cy + p // 2 + 1, h)):
                for x in range(max(cx - q // 2, 0), min(cx + q // 2 + 1, w)):
                    if weights[b, y, x] > 0:
                        value = psfs[b, y - cy + p // 2, x - cx + q // 2]
                        signal += images[b, y, x] * value
                        noise2 += value * value / weights[b, y, x]
        if noise2 > 0:
            out[k] = signal / np.sqrt(noise2)
    return out


@kernel
def grow_symmetric(image, cy, cx, limit, reached, queue):
    """Find the pixels that a path of falling values joins to (cy, cx), on the symmetrised image.

    The value of a pixel is the smaller of itself and its mirror about the centre (nothing where the mirror lies
    outside); only values above `limit` count. reached (h, w) uint8, zero on entry, is 1 on these pixels
    afterwards; queue, at least as long as the image, holds them. Returns their number; zero when the centre
    itself is not above `limit`.
    """
    h, w = image.shape
    if not image[cy, cx] > limit:
        return 0
    reached[cy, cx] = 1
    queue[0] = cy * w + cx
    first, last = 0, 1
    while first < last:
        y, x = queue[first] // w, queue[first] % w
        first += 1
        value = min(image[y, x], image[2 * cy - y, 2 * cx - x])
        for k in range(4):
            ny = y + (1 if k == 0 else (-1 if k == 1 else 0))
            nx = x + (1 if k == 2 else (-1 if k == 3 else 0))
            my, mx = 2 * cy - ny, 2 * cx - nx
            if ny < 0 or ny >= h or nx < 0 or nx >= w or my < 0 or my >= h or mx < 0 or mx >= w:
                continue
            if reached[ny, nx] == 0:
                candidate = min(image[ny, nx], image[my, mx])
                if limit < candidate <= value:
                    reached[ny, nx] = 1
                    queue[last] = ny * w + nx
                    last += 1
    return last


@kernel
def first_morphologies(image, centers, limit, pad):
    """Cut a first morphology around every centre out of a detection image.

    image (h, w), centers (K, 2). Monotonic and symmetric (see grow_symmetric), in the smallest box around the
    pixels above `limit`, grown by `pad` inside the image; largest value 1. Returns boxes (K, 4), offsets
    (K + 1,) and the packed morphologies; the box of a centre that is not above `limit` is empty.
    """
    h, w = image.shape
    reached = np.zeros((h, w), dtype=np.uint8)
    queue = np.empty(h * w, dtype=np.int64)
    boxes = np.zeros((len(centers), 4), dtype=np.int64)
    offsets = np.zeros(len(centers) + 1, dtype=np.int64)
    packed = np.zeros(64 * len(centers) + 64, dtype=np.float32)
    for k in range(len(centers)):
        cy, cx = centers[k]
        n = grow_symmetric(image, cy, cx, limit, reached, queue)
        offsets[k + 1] = offsets[k]
        if n == 0:
            continue
        y0, y1, x0, x1 = cy, cy + 1, cx, cx + 1
        for i in range(n):
            y, x = queue[i] // w, queue[i] % w
            reached[y, x] = 0
            y0, y1 = min(y0, y), max(y1, y + 1)
            x0, x1 = min(x0, x), max(x1, x + 1)
        y0, y1 = max(y0 - pad, 0), min(y1 + pad, h)
        x0, x1 = max(x0 - pad, 0), min(x1 + pad, w)
        boxes[k] = (y0, x0, y1 - y0, x1 - x0)
        end = offsets[k] + (y1 - y0) * (x1 - x0)
        offsets[k + 1] = end
        if end > len(packed):
            larger = np.zeros(2 * end, dtype=np.float32)
            larger[: offsets[k]] = packed[: offsets[k]]
            packed = larger
        for i in range(n):
            y, x = queue[i] // w, queue[i] % w
            value = min(image[y, x], image[2 * cy - y, 2 * cx - x])
            packed[offsets[k] + (y - y0) * (x1 - x0) + x - x0] = value / image[cy, cx]
    return boxes, offsets, packed[: offsets[-1]].copy()
