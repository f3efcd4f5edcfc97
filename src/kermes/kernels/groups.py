"""Which sources are fitted together: neighbours, joined pair by pair."""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, kernel


@kernel
def sort_by(numbers, keys):
    """Sort numbers by the keys that they have, those with equal keys by themselves (Shell 1959)."""
    gap = 1
    while gap < len(numbers) // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, len(numbers)):
            moved, k = numbers[i], i
            while k >= gap:
                other = numbers[k - gap]
                if keys[other] < keys[moved] or (keys[other] == keys[moved] and other < moved):
                    break
                numbers[k] = other
                k -= gap
            numbers[k] = moved
        gap //= 3


@allocating_kernel
def join_pairs(pairs, order, n_sources, most):
    """Join sources, pair by pair in the given order, into groups of at most `most`.

    Returns (members (S,), starts (G + 1,)): group g holds members[starts[g] : starts[g + 1]]; groups in the order of
    their first sources.
    """
    label, following = np.arange(n_sources), np.arange(n_sources)
    size = np.ones(n_sources, dtype=np.int64)
    for p in order:
        s, t = pairs[p, 0], pairs[p, 1]
        first, second = label[s], label[t]
        if first == second or size[first] + size[second] > most:
            continue
        size[first] += size[second]
        k = t
        while label[k] != first:
            label[k] = first
            k = following[k]
        # Members of a group form a ring: crossing two links joins two rings.
        following[s], following[t] = following[t], following[s]
    members = np.empty(n_sources, dtype=np.int64)
    starts = np.zeros(n_sources + 1, dtype=np.int64)
    n_groups, n = 0, 0
    for s in range(n_sources):
        if label[s] >= 0:
            k = s
            while label[k] >= 0:
                members[n] = k
                n += 1
                label[k] = -1
                k = following[k]
            n_groups += 1
            starts[n_groups] = n
    return members, starts[: n_groups + 1]


@allocating_kernel
def join_neighbors(positions, brightness, pairs, link, most, ratio):
    """Join pairs of sources at positions (S, 2) that are closer than `link`, the closest first; see `join_pairs`.

    Pairs in which one is more than `ratio` times brighter are left out.
    """
    distance, order = np.empty(len(pairs)), np.empty(len(pairs), np.int64)
    n = 0
    for p in range(len(pairs)):
        i, j = pairs[p, 0], pairs[p, 1]
        distance[p] = np.hypot(positions[i, 0] - positions[j, 0], positions[i, 1] - positions[j, 1])
        one, other = brightness[i], brightness[j]
        if distance[p] < link and max(one, other) <= ratio * min(one, other):
            order[n] = p
            n += 1
    sort_by(order[:n], distance)
    return join_pairs(pairs, order[:n], len(positions), most)


@allocating_kernel
def regroup(positions, brightness, pairs, link, most, ratio, snr, members, offsets, settled):
    """Join neighbours anew, see `join_neighbors`; the members of a group in the order of their snr (S,).

    members, offsets, settled: the groups that there were, and whether each was settled. Returns those of the new
    groups; one that has the members that it had is as settled as it was.
    """
    members_now, offsets_now = join_neighbors(positions, brightness, pairs, link, most, ratio)
    before = np.empty(len(positions), np.int64)
    for s in range(len(before)):
        before[s] = -1
    for g in range(len(settled)):
        for k in range(offsets[g], offsets[g + 1]):
            before[members[k]] = g
    settled_now = np.empty(len(offsets_now) - 1, np.bool_)
    for g in range(len(settled_now)):
        own = members_now[offsets_now[g] : offsets_now[g + 1]]
        sort_by(own, snr)
        old = before[own[0]]
        same = old >= 0 and offsets[old + 1] - offsets[old] == len(own)
        for s in own:
            same = same and before[s] == old
        settled_now[g] = same and settled[old]
    return members_now, offsets_now, settled_now
