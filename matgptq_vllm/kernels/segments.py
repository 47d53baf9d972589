"""Which rows of a step read which width of a layer, known on the host without asking the device.

The engine writes two buffers before a step (``engine.step_buffers``); ``rows_of_width`` reads them for one layer:

    step_profiles  int32 [profiles], CPU     rows of each profile in the step
    row_order      int32 [max rows], device  the step's rows, sorted by profile; every later row at its own place

Rows after the step's are padding. They have the profile of the last row in ``row_order``, so that they bring no width of
their own.
"""

import torch


def rows_of_width(
    m: int, step_profiles: torch.Tensor, row_order: torch.Tensor, host_profile_widths: torch.Tensor
) -> list[tuple[int, torch.Tensor | None]] | None:
    """The widths that occur in a product of ``m`` rows, each with its rows.

    Args:
        step_profiles: int32 [profiles], on the CPU.
        row_order: int32 [at least m], on any device.
        host_profile_widths: int32 [profiles], on the CPU: the layer's width in each profile.

    Returns:
        (width, rows), with rows int32 on the device of ``row_order``, or None for all of them. None instead of a list if the
        product has fewer rows than the step, and so is not the step's.
    """
    counts = step_profiles.tolist()
    widths = host_profile_widths.tolist()
    present = [profile for profile, count in enumerate(counts) if count]
    if len({widths[profile] for profile in present}) == 1:
        return [(widths[present[0]], None)]
    if sum(counts) > m:
        return None
    parts: dict[int, list[torch.Tensor]] = {}
    start = 0
    for profile in present:
        end = m if profile == present[-1] else start + counts[profile]
        parts.setdefault(widths[profile], []).append(row_order[start:end])
        start = end
    return [(width, rows[0] if len(rows) == 1 else torch.cat(rows)) for width, rows in parts.items()]
