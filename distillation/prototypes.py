"""Prototype learning (paper, section 3.2): k-means of one class's latents."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch


class Prototypes(NamedTuple):
    """The prototypes of one class.

    latents    (k, c, h, w) float16 numpy array, already times the VAE's scaling factor
    sizes      (k,) how many of the class's images belong to each: are nearest to it, or, with
               "gmm", most likely of it; None each where that is not known (the release's file)
    """

    latents: np.ndarray
    sizes: np.ndarray


def class_prototypes(latents, k, buffer_size, method="minibatch", device="cpu") -> Prototypes:
    """K-means centres of one class's latents: (N, c, h, w) -> (k, c, h, w), (k,) sizes.   N >= k

    method   "minibatch" (the paper) is fed in buffers of `buffer_size` >= k rows; "full" is Lloyd's
             algorithm on all rows; "gmm" is `gaussian_mixture`; "none" takes the first k rows
    Works in float64, as scikit-learn does when the release hands it fp16 latents; the result is
    rounded to fp16, the precision that synthesis uses.
    """
    rows, nearest = np.ascontiguousarray(latents.reshape(len(latents), -1), dtype=np.float64), None
    if method == "none":
        centres = rows[:k]
    elif method == "gmm":
        centres, nearest = gaussian_mixture(rows, k)
    elif method == "full":
        from sklearn.cluster import KMeans

        centres = KMeans(n_clusters=k, random_state=0, n_init=1).fit(rows).cluster_centers_
    elif torch.device(device).type == "cuda":
        # a stream of its own, so that reading a number back does not wait for the encoder
        with torch.cuda.stream(_stream(device)):
            centres = minibatch_torch(rows, k, buffer_size, device)
    else:
        centres = minibatch_sklearn(rows, k, buffer_size)
    if nearest is None:
        nearest = _nearest(torch.from_numpy(rows), torch.from_numpy(centres)).numpy()
    shape = (k, *latents.shape[1:])
    return Prototypes(centres.reshape(shape).astype(np.float16), np.bincount(nearest, minlength=k))


def gaussian_mixture(rows, k):
    """Means of a Gaussian mixture, and the component of each row: (n, d) -> (k, d), (n,)

    After the "GMM" of MGD3's comparison of prototypes (arXiv 2505.18963); which kind that was is
    not known here. One variance per component: a handful of images cannot tell the 16,384 of
    "diag". In so many dimensions a row belongs to one component nearly surely, so that the means
    come close to `full`'s centres.
    """
    from sklearn.mixture import GaussianMixture

    if len(rows) == k:  # it refuses a single row
        return rows, np.arange(k)
    how = {"covariance_type": "spherical", "init_params": "k-means++", "random_state": 0}
    found = GaussianMixture(k, max_iter=1000, **how).fit(rows)
    return found.means_, found.predict(rows)


@lru_cache
def _stream(device):
    """One per device, kept: PyTorch does not reuse the memory of one stream in another."""
    return torch.cuda.Stream(device, priority=-1)


def _buffers(rows, buffer_size):
    # differs from the release: the last, shorter buffer is fitted too, for every class; the release
    # drops it for all but one
    return (rows[start : start + buffer_size] for start in range(0, len(rows), buffer_size))


def minibatch_sklearn(rows, k, buffer_size):
    """The release's own sequence of calls."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(n_clusters=k, random_state=0, batch_size=buffer_size, n_init="auto")
    for buffer in _buffers(rows, buffer_size):
        kmeans.partial_fit(buffer)
    return kmeans.cluster_centers_


def minibatch_torch(rows, k, buffer_size, device):
    """The sequence of `MiniBatchKMeans.partial_fit` in float64 on `device`; equal up to rounding.

    Every centre moves by  c <- (1 - m/n) c + (m/n) mean of its m new rows,  n = its rows so far.
    Centres with very few rows are re-drawn from the buffer now and then, with scikit-learn's rule
    and random numbers; at ImageNet's class sizes that happens, so a plain online mean would differ.
    """
    from sklearn.cluster import kmeans_plusplus

    random = np.random.RandomState(0)
    first = rows[:buffer_size]  # scikit-learn fixes its batch size here
    centres, _ = kmeans_plusplus(first, k, random_state=random)
    centres = torch.from_numpy(centres).to(device)  # (k, d)
    n = torch.zeros(k, dtype=torch.float64, device=device)
    empty, since_reassignment = True, 0
    for x in _buffers(torch.from_numpy(rows).to(device), buffer_size):  # (b, d)
        members = torch.nn.functional.one_hot(_nearest(x, centres), k).to(x.dtype)  # (b, k)
        m = members.sum(0)  # (k,)
        moved = (centres * n[:, None] + members.T @ x) * (1 / (n + m).clamp(min=1))[:, None]
        centres, n = torch.where(m[:, None] > 0, moved, centres), n + m
        since_reassignment += len(first)
        if empty or since_reassignment >= 10 * k:
            since_reassignment = 0
            centres, n = _reassign(centres, n, x, random)
            empty = bool((n == 0).any())
    return centres.cpu().numpy()


def _reassign(centres, n, x, random):
    """scikit-learn's rule: a centre with under 1 % of the largest count gets a random row."""
    counts = n.cpu().numpy().copy()
    weak = counts < 0.01 * counts.max()
    if weak.sum() > 0.5 * len(x):
        weak[np.argsort(counts)[int(0.5 * len(x)) :]] = False
    if weak.any():
        chosen = torch.from_numpy(random.choice(len(x), replace=False, size=weak.sum()))
        places = torch.from_numpy(np.flatnonzero(weak))
        centres = centres.index_copy(0, places.to(x.device), x[chosen.to(x.device)])
        counts[weak] = counts[~weak].min()
    return centres, torch.from_numpy(counts).to(x.device)


def _nearest(rows, centres):
    """(n, d), (k, d) -> (n,) index of the nearest centre; the first one of equals everywhere."""
    # |x|^2 is the same for every centre
    distance = centres.square().sum(1) - rows @ (2 * centres.T)
    first = torch.arange(len(centres), device=rows.device).expand_as(distance)
    return torch.where(distance == distance.amin(1, keepdim=True), first, len(centres)).amin(1)


if __name__ == "__main__":  # FOLDER OUT.json: exports in the release's form
    from distillation import prototype_files

    prototype_files.main()
