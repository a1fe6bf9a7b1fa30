"""What ranks send each other in a call: a block's codes, and at the end the final hidden states.

Hidden states cross as they are, in the model's dtype; for the last token or the class token that is
one vector a sequence. Ranks that were given pictures begin with a few means of theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .call import Call
from .codes.base import Bytes, Payload, received_mask
from .control import Control
from .errors import InputsDiffer, WireError
from .last_tokens import LastTokens
from .trace import stage
from .transport import peers_of, require

Ranges = Sequence[tuple[int, int]]  # of bytes, [start, stop)
SAME_PICTURE = 0.02  # of a picture's root mean square: what preprocessing may round differently
DIMMEST = 0.1  # of the largest root mean square of a batch: no picture is taken for dimmer
STAR_RANKS = 4  # up to so many send their class tokens straight to the rank that has the answer
STEP_SECONDS = 0.1  # in which a rank that gives up has told the next one, in a tree


def send_tensor(call: Call, tensor: Tensor, *, block: int, to: Iterable[int]) -> None:
    """Sends a tensor's bytes to `to`; whoever receives it knows shape and dtype.

    Behind them comes what this rank knows to be missing, where ranks may be left out.
    """
    mesh, missing = call.mesh, call.missing
    receivers = tuple(to)
    if not receivers:
        return
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    size = flat.numel()
    frame = mesh.buffer(size + (missing.all_width if missing else 0))
    torch.frombuffer(frame.payload, dtype=torch.uint8)[:size].copy_(flat)
    if missing:
        missing.write_all(frame.payload[size:])
    with stage("send"):
        partial = missing is not None
        mesh.send(frame, block=block, plan=call.tag, to=receivers, partial=partial)


def receive_tensors(
    call: Call,
    shapes: Mapping[int, tuple[int, ...]],
    like: Tensor,
    *,
    block: int,
    extra: float = 0.0,
) -> dict[int, Tensor]:
    """The tensors of the given shapes that these ranks sent, with the dtype of `like`.

    Where ranks may be left out, those that are not needed get no longer than a block's exchange;
    the others `extra` seconds longer than answers take.
    """
    sizes = {n: like.dtype.itemsize * torch.Size(shape).numel() for n, shape in shapes.items()}
    with stage("wait"):
        views = _receive_answer(call, sizes, block, extra) if sizes else {}
    return {
        n: torch.frombuffer(view, dtype=torch.uint8)
        .to(like.device, copy=True)
        .view(like.dtype)
        .view(shapes[n])
        for n, view in views.items()
    }


def send_picture(call: Call) -> None:
    """Means of this rank's picture to every rank, before any codes of it."""
    if call.views.picture is not None:
        data = call.views.picture.numpy().tobytes()
        partial, to = call.missing is not None, peers_of(call.mesh)
        call.mesh.send(data, block=Control.PICTURE, plan=call.tag, to=to, partial=partial)


def compare_pictures(call: Call) -> None:
    """Raises InputsDiffer where another rank was given another picture, in the call's first wait.

    A rank that is late, where ranks may be left out, is not compared.
    """
    ours = call.views.picture
    if ours is None or call.state.compared:
        return
    strength = ours[:, -1]
    bound = SAME_PICTURE * strength.clamp(min=DIMMEST * float(strength.max()))
    call.state.compared = True
    sizes = dict.fromkeys(peers_of(call.mesh), 4 * ours.numel())
    with stage("wait"):
        views = _receive(call, sizes, Control.PICTURE, call.deadline)
    for rank, view in sorted(views.items()):
        theirs = torch.frombuffer(view, dtype=torch.float32).view(ours.shape)
        difference = (theirs - ours).abs().amax(1)
        if not bool((difference <= bound).all()):
            raise InputsDiffer(
                call.rank,
                f"pixel_values: expected the same picture on every rank, rank {rank} has one whose "
                f"means differ by {float(difference.max()):.3g}",
            )


def gather(call: Call, hidden: Tensor) -> Tensor:
    """The hidden states that `call.answer` asks for, from this rank's [B, copies + T, D].

    "last": the last token of a decoder, [B, 1, D], or the mean of all ranks' class tokens
    (Distributed Class Tokens: with dense exchange the copies are equal), of those that came where
    ranks may be left out. "all": the class token and all tokens. "local": what this rank has. A
    rank that is not to have the answer gets its own.
    """
    plan, rank = call.plan, call.rank
    if call.answer == "last" and call.last_tokens is not None:
        return _gather_last_tokens(call, call.last_tokens, hidden)
    if call.answer == "local" or call.mesh.world_size == 1:
        last = call.answer == "last"
        return hidden if not last else hidden[:, -1:] if plan.causal else hidden[:, :1]
    if call.answer == "all":
        piece, senders = hidden, set(range(plan.world_size))
    elif not plan.causal and call.missing is None and go_by_tree(plan.world_size, hidden.dtype):
        # who is left out would take others along, so there is no tree where ranks may be
        return _mean_by_tree(call, hidden[:, : plan.copies])
    elif not plan.causal:
        piece, senders = hidden[:, : plan.copies], set(range(plan.world_size))
    else:
        piece, senders = hidden[:, -1:], {plan.owner}

    takers = set(range(plan.world_size)) if call.everywhere else {plan.owner}
    if rank in senders:
        send_tensor(call, piece, block=Control.HEAD, to=sorted(takers - {rank}))
    if rank not in takers:
        return piece
    whole = call.answer == "all"
    shapes = {
        n: (len(hidden), plan.copies + plan.size(n) if whole else 1, hidden.shape[-1])
        for n in senders - {rank}
    }
    pieces = receive_tensors(call, shapes, hidden, block=Control.HEAD)
    if rank in senders:
        pieces[rank] = piece
    ordered = [pieces[n] for n in sorted(pieces)]
    if plan.causal and not whole:
        return ordered[0]
    first = [p[:, : plan.copies] for p in ordered]
    token = first[0] if plan.causal else torch.stack(first).mean(0)
    return torch.cat([token, *(p[:, plan.copies :] for p in ordered)], 1)


def go_by_tree(world_size: int, dtype: torch.dtype) -> bool:
    """Whether class tokens are added up on their way: not in half precision, whose sums would be
    rounded at every step."""
    return world_size > STAR_RANKS and dtype == torch.float32


def _mean_by_tree(call: Call, token: Tensor) -> Tensor:
    """The mean of all ranks' class tokens [B, 1, D], by a binomial tree whose root is rank 0.

    N ranks take log2 N steps, and no link carries more than so many vectors: straight to one rank,
    N - 1 of them pass its downlink one after another. The same way back where every rank is to have
    the mean; a rank that is not gets its own.
    """
    rank, world = call.rank, call.mesh.world_size
    behind = rank & -rank or 1 << (world - 1).bit_length()  # ranks in this one's branch, and itself
    steps = [1 << n for n in range(behind.bit_length() - 1)]
    children = [rank + step for step in steps if rank + step < world]
    # who waits for another must not give up before that one has named whom it waits for
    shapes, extra = dict.fromkeys(children, tuple(token.shape)), STEP_SECONDS * len(steps)
    received = receive_tensors(call, shapes, token, block=Control.HEAD, extra=extra)
    total = sum((received[child] for child in children), token)
    mean = total / world
    if rank:
        parent = rank - behind
        send_tensor(call, total, block=Control.HEAD, to=[parent])
        if not call.everywhere:
            return token
        back = {parent: tuple(token.shape)}
        extra += STEP_SECONDS * world.bit_length()
        mean = receive_tensors(call, back, token, block=Control.HEAD, extra=extra)[parent]
    if call.everywhere:
        # the child with the most ranks behind it first
        send_tensor(call, mean, block=Control.HEAD, to=reversed(children))
    return mean


def _gather_last_tokens(call: Call, last: LastTokens, hidden: Tensor) -> Tensor:
    """[B, 1, D], each row's last token, from whichever ranks have them."""
    rank, senders = call.rank, last.senders
    takers = set(range(call.plan.world_size)) if call.everywhere else {call.plan.owner}
    pieces = {rank: last.take(hidden, rank)} if rank in senders else {}
    if pieces:
        send_tensor(call, pieces[rank], block=Control.HEAD, to=sorted(takers - {rank}))
    if rank not in takers:
        return hidden[:, -1:]
    sizes = {n: len(last.rows(n)) for n in sorted(senders - {rank})}
    shapes = {n: (rows, 1, hidden.shape[-1]) for n, rows in sizes.items()}
    return last.put(pieces | receive_tensors(call, shapes, hidden, block=Control.HEAD))


def _receive_answer(
    call: Call, sizes: Mapping[int, int], block: int, extra: float
) -> dict[int, memoryview]:
    """What these ranks contribute to the answer, of those that are not left out."""
    missing = call.missing
    patience = (call.mesh.timeout if call.patience is None else call.patience) + extra
    if missing is None:
        return _receive(call, sizes, block, patience)
    totals = {n: size + missing.all_width for n, size in sizes.items()}
    needed = {n: total for n, total in totals.items() if n in call.needed}
    others = {n: total for n, total in totals.items() if n not in call.needed}
    frames = _receive(call, needed, block, patience, needed=needed)
    frames |= _receive(call, others, block, call.deadline)
    missing.leave_out(missing.answer, sizes.keys() - frames.keys())
    for n, view in frames.items():
        missing.read_all(view[sizes[n] :], n)
    return {n: view[: sizes[n]] for n, view in frames.items()}


def _receive(
    call: Call,
    sizes: Mapping[int, int],
    block: int,
    timeout: float | None,
    needed: Collection[int] = (),
) -> dict[int, memoryview]:
    """The frames of these ranks. Where ranks may be left out, of those that were in time: all that
    are `needed`, or an error."""
    mesh, partial = call.mesh, call.missing is not None
    frames = mesh.receive(sizes, block=block, plan=call.tag, timeout=timeout, partial=partial)
    if needed:
        require(mesh, frames, needed, block, mesh.timeout if timeout is None else timeout)
    return frames


def receive_payloads(call: Call, block: int) -> list[Payload]:
    """The codes of a block, by source; of those that did not arrive whole, which tokens are there.

    Bytes that did not arrive are zeros. A block of which nobody sends anything is not waited for.
    Where codes stay on the device nothing is waited for: the mesh's `check_received` looks later at
    what has to be known of them.
    """
    sizes, before = call.sizes, call.rank - 1  # whose frame has fine codes for this rank
    if not sizes.sources:
        if call.on_device:  # what was sent would wait for something that is received
            call.mesh.receive_on_device({}, block=block, plan=call.tag)
        return []
    compare_pictures(call)
    coarse = {n: sizes.payload[block][n] for n in sizes.sources}
    totals = {n: size + _fine_bytes(call, block, n) for n, size in coarse.items()}
    views: Mapping[int, Bytes] = dict.fromkeys(totals, memoryview(b""))
    ranges: Mapping[int, Ranges] = {}
    if any(totals.values()):
        with stage("wait", block):
            views, ranges = _receive_codes(call, totals, block)
    payloads = []
    for n, size in coarse.items():
        tokens, fine = sizes.num_sent[n], sizes.num_fine[n] if n == before else 0
        masks: list[Tensor | None] = [None, None]
        if n in ranges:
            layout = call.codec.token_layout(block, call.batch, tokens)
            masks[0] = received_mask(layout, call.batch, tokens, ranges[n])
            behind = [(start - size, stop - size) for start, stop in ranges[n]]
            layout = call.codec.fine_layout(block, call.batch, fine)
            masks[1] = received_mask(layout, call.batch, fine, behind)
        view = views[n]
        call.keep_codes(n, block, view[:size])
        payloads.append(
            Payload(
                view[:size],
                tokens,
                sizes.num_received[n],
                masks[0],
                view[size:],
                fine if len(view) > size else 0,
                masks[1],
            )
        )
        if call.on_device and len(view):
            _check_later(call, block, payloads[-1])
    return payloads


def _check_later(call: Call, block: int, payload: Payload) -> None:
    right = call.codec.codes_are_right(block, payload, call.batch)
    if right is not None:
        got = f"something else in block {block}"
        call.mesh.check_later(right, WireError("payload", "codes as a rank packs them", got))


def _fine_bytes(call: Call, block: int, source: int) -> int:
    """Of the fine codes that this rank receives of `source`: those of the rank before it."""
    return call.sizes.fine[block][source] if source == call.rank - 1 else 0


def _receive_codes(
    call: Call, sizes: Mapping[int, int], block: int
) -> tuple[Mapping[int, Bytes], Mapping[int, Ranges]]:
    """Payloads by rank, and the ranges of bytes [start, stop) that some of them lack."""
    mesh, missing = call.mesh, call.missing
    if call.on_device:
        timeout, tag = call.deadline, call.tag
        return mesh.receive_on_device(sizes, block=block, plan=tag, timeout=timeout), {}
    if missing is None:
        return _receive(call, sizes, block, call.deadline), {}
    totals = {n: size + missing.width for n, size in sizes.items()}
    needed = call.needed & sizes.keys()
    if mesh.lossy:  # that a frame was lost says nothing of its sender, who will have an answer
        frames = _receive(call, totals, block, call.deadline)
        require(mesh, frames, needed & mesh.lost.keys(), block, call.deadline or mesh.timeout)
    else:
        frames = _receive(call, totals, block, call.deadline, needed)
    views, lacking = {}, {}
    for n, size in sizes.items():
        view = frames[n] if n in frames else memoryview(bytearray(totals[n]))
        ranges = mesh.missing_ranges.get(n, ()) if n in frames else [(0, totals[n])]
        for start, stop in ranges:
            view[start:stop] = bytes(stop - start)
        if ranges:
            lacking[n] = ranges
        missing.read_recent(block, view[size:], n)
        views[n] = view[:size]
    missing.leave_out(block, lacking)
    return views, lacking
