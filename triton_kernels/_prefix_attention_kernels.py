"""Kernels of prefix_attention.py: tiles of scores that never leave the registers.

Shapes: N tokens, Hq query heads, Hk key heads, P prefix tokens, D head width. Forward and the
gradient of queries have BLOCK_N tokens of one head a program and go over keys, BLOCK_S at a time;
the gradients of keys and values the other way round. Tensors [N, Hq] are contiguous, the others
have unit stride along D. _prefix_attention_triton.py launches them.
"""

from __future__ import annotations  # tl.constexpr stays a string where Triton is not installed

from ._launch import jit, tl


@jit
def _load(
    ptr,
    n,
    end,
    stride_n,
    MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows n, 0 beyond D and (if MASK) from row `end` on."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + n.to(tl.int64)[:, None] * stride_n + d[None, :]
    if MASK:
        inside = (n < end)[:, None]
        if D < BLOCK_D:
            inside = inside & (d < D)[None, :]
        x = tl.load(ptrs, mask=inside, other=0.0)
    elif D < BLOCK_D:
        x = tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    if UPCAST:  # the interpreter has no bf16 arithmetic
        x = x.to(tl.float32)
    return x


@jit
def _store(ptr, n, end, stride_n, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (n < end)[:, None] & (d < D)[None, :]
    ptrs = ptr + n.to(tl.int64)[:, None] * stride_n + d[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=inside)


@jit
def _add(ptr, n, end, stride_n, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    x += _load(ptr, n, end, stride_n, True, False, D, BLOCK_D)
    _store(ptr, n, end, stride_n, x, D, BLOCK_D)


@jit
def _attend(
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    first,
    whole,
    end,
    visible,
    stride_kn,
    stride_vn,
    scale,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of 2^(x - top) times the values (acc) and alone (total), with the keys [first, end).

    x: the scores in bits. Tiles of keys up to `whole` are whole, and every row sees them; after it
    a row sees keys up to `visible` [BLOCK_N].
    """
    for MASK in tl.static_range(2):
        for start in range(whole if MASK else first, end if MASK else whole, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            k = _load(k_ptr, s, end, stride_kn, MASK, UPCAST, D, BLOCK_D)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if MASK:
                x = tl.where(s[None, :] <= visible[:, None], x, -float("inf"))
            new_top = tl.maximum(top, tl.max(x, axis=1) * scale)
            p = tl.exp2(x * scale - new_top[:, None])
            keep = tl.exp2(top - new_top)
            top = new_top
            total = total * keep + tl.sum(p, axis=1)
            v = _load(v_ptr, s, end, stride_vn, MASK, UPCAST, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, total, top


@jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    carry_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    P,
    heads,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_pkn,
    stride_pkh,
    stride_pvn,
    stride_pvh,
    scale,
    CARRY: tl.constexpr,
    PREFIX: tl.constexpr,
    OWN: tl.constexpr,
    REPEATS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse over a prefix segment (if PREFIX), the own sequence (if OWN), and (if CARRY) what
    launches before this one have left in `carry` [N, Hq, D] and lse; `scale` and lse in bits:
    in nats they would be rounded once more, which shows in large scores."""
    tl.static_assert(BLOCK_N % BLOCK_S == 0)  # tiles of keys before a tile of tokens are whole
    tile = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    key_head = h // REPEATS
    first = tl.load(tiles_ptr + 3 * tile)
    begin = tl.load(tiles_ptr + 3 * tile + 1)
    end = tl.load(tiles_ptr + 3 * tile + 2)
    n = first + tl.arange(0, BLOCK_N)
    stride_on = tl.cast(heads, tl.int64) * D
    q = _load(q_ptr + h * stride_qh, n, end, stride_qn, True, UPCAST, D, BLOCK_D)
    lse_ptrs = lse_ptr + n.to(tl.int64) * heads + h
    if CARRY:
        acc = _load(carry_ptr + h * D, n, end, stride_on, True, False, D, BLOCK_D)
        total = tl.full((BLOCK_N,), 1.0, tl.float32)
        top = tl.load(lse_ptrs, mask=n < end, other=0.0)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    if PREFIX:
        k = prefix_k_ptr + key_head * stride_pkh
        v = prefix_v_ptr + key_head * stride_pvh
        whole = P // BLOCK_S * BLOCK_S
        last = tl.zeros((BLOCK_N,), tl.int32) + (P - 1)
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            k,
            v,
            0,
            whole,
            P,
            last,
            stride_pkn,
            stride_pvn,
            scale,
            UPCAST,
            PRECISION,
            D,
            BLOCK_S,
            BLOCK_D,
        )
    if OWN:
        k = k_ptr + key_head * stride_kh
        v = v_ptr + key_head * stride_vh
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            k,
            v,
            begin,
            first,
            tl.minimum(first + BLOCK_N, end),
            n,
            stride_kn,
            stride_vn,
            scale,
            UPCAST,
            PRECISION,
            D,
            BLOCK_S,
            BLOCK_D,
        )
    _store(out_ptr + h * D, n, end, stride_on, acc / total[:, None], D, BLOCK_D)
    tl.store(lse_ptrs, top + tl.log2(total), mask=n < end)


@jit
def _query_gradient(
    acc,
    q,
    grad,
    lse,
    delta,
    k_ptr,
    v_ptr,
    first,
    whole,
    end,
    visible,
    stride_kn,
    stride_vn,
    scale,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """acc with the keys [first, end); lse and scale in bits, the rest as in `_attend`."""
    for MASK in tl.static_range(2):
        for start in range(whole if MASK else first, end if MASK else whole, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            k = _load(k_ptr, s, end, stride_kn, MASK, UPCAST, D, BLOCK_D)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(x * scale - lse[:, None])
            if MASK:
                p = tl.where(s[None, :] <= visible[:, None], p, 0.0)
            v = _load(v_ptr, s, end, stride_vn, MASK, UPCAST, D, BLOCK_D)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            dx = p * (dp - delta[:, None])
            acc = tl.dot(dx.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@jit
def query_gradient_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    carry_ptr,
    grad_q_ptr,
    tiles_ptr,
    P,
    heads,
    stride_gn,
    stride_gh,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_pkn,
    stride_pkh,
    stride_pvn,
    stride_pvh,
    scale,
    unit,
    CARRY: tl.constexpr,
    PREFIX: tl.constexpr,
    OWN: tl.constexpr,
    REPEATS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`unit` times the sum over keys, as `forward_kernel`; the first launch stores delta [N, Hq],
    the sum of gradient times output."""
    tl.static_assert(BLOCK_N % BLOCK_S == 0)
    tile = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    key_head = h // REPEATS
    first = tl.load(tiles_ptr + 3 * tile)
    begin = tl.load(tiles_ptr + 3 * tile + 1)
    end = tl.load(tiles_ptr + 3 * tile + 2)
    n = first + tl.arange(0, BLOCK_N)
    stride_on = tl.cast(heads, tl.int64) * D
    numbers = n.to(tl.int64) * heads + h
    q = _load(q_ptr + h * stride_qh, n, end, stride_qn, True, UPCAST, D, BLOCK_D)
    grad = _load(grad_ptr + h * stride_gh, n, end, stride_gn, True, UPCAST, D, BLOCK_D)
    lse = tl.load(lse_ptr + numbers, mask=n < end, other=0.0)
    if CARRY:
        acc = _load(carry_ptr + h * D, n, end, stride_on, True, False, D, BLOCK_D)
        delta = tl.load(delta_ptr + numbers, mask=n < end, other=0.0)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        out = _load(out_ptr + h * D, n, end, stride_on, True, UPCAST, D, BLOCK_D)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
        tl.store(delta_ptr + numbers, delta, mask=n < end)
    if PREFIX:
        k = prefix_k_ptr + key_head * stride_pkh
        v = prefix_v_ptr + key_head * stride_pvh
        whole = P // BLOCK_S * BLOCK_S
        last = tl.zeros((BLOCK_N,), tl.int32) + (P - 1)
        acc = _query_gradient(
            acc,
            q,
            grad,
            lse,
            delta,
            k,
            v,
            0,
            whole,
            P,
            last,
            stride_pkn,
            stride_pvn,
            scale,
            UPCAST,
            PRECISION,
            D,
            BLOCK_S,
            BLOCK_D,
        )
    if OWN:
        k = k_ptr + key_head * stride_kh
        v = v_ptr + key_head * stride_vh
        acc = _query_gradient(
            acc,
            q,
            grad,
            lse,
            delta,
            k,
            v,
            begin,
            first,
            tl.minimum(first + BLOCK_N, end),
            n,
            stride_kn,
            stride_vn,
            scale,
            UPCAST,
            PRECISION,
            D,
            BLOCK_S,
            BLOCK_D,
        )
    _store(grad_q_ptr + h * D, n, end, stride_on, acc * unit, D, BLOCK_D)


@jit
def _key_gradients(
    dk,
    dv,
    k,
    v,
    grad_ptr,
    q_ptr,
    lse_ptr,
    delta_ptr,
    first,
    end,
    s,
    heads,
    stride_gn,
    stride_gh,
    stride_qn,
    stride_qh,
    scale,
    CAUSAL: tl.constexpr,
    REPEATS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk, dv with the tokens [first, end) of the query heads from the one that the pointers are at.

    CAUSAL: only with tokens that see key s. lse and scale in bits.
    """
    blocks = tl.cdiv(end - first, BLOCK_N)
    for i in range(0, REPEATS * blocks):  # one loop, not two, so that its loads are ahead of it
        h = (i // blocks).to(tl.int64)
        n = first + i % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        numbers = n.to(tl.int64) * heads + h
        # a token beyond the end has queries, gradient and delta of 0: it adds nothing
        q = _load(q_ptr + h * stride_qh, n, end, stride_qn, True, UPCAST, D, BLOCK_D)
        lse = tl.load(lse_ptr + numbers, mask=n < end, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(x * scale - lse[None, :])
        if CAUSAL:
            p = tl.where(s[:, None] <= n[None, :], p, 0.0)
        grad = _load(grad_ptr + h * stride_gh, n, end, stride_gn, True, UPCAST, D, BLOCK_D)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        delta = tl.load(delta_ptr + numbers, mask=n < end, other=0.0)
        dx = p * (dp - delta[None, :])
        dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@jit
def own_gradients_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    tiles_ptr,
    heads,
    stride_gn,
    stride_gh,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    scale,
    unit,
    REPEATS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a tile of own keys and values, from its sequence's tokens at or after it."""
    tl.static_assert(BLOCK_S % BLOCK_N == 0)
    tile = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    first = tl.load(tiles_ptr + 3 * tile)
    end = tl.load(tiles_ptr + 3 * tile + 2)
    s = first + tl.arange(0, BLOCK_S)
    past = tl.minimum(first + BLOCK_S, end)
    k = _load(k_ptr + key_head * stride_kh, s, end, stride_kn, True, UPCAST, D, BLOCK_D)
    v = _load(v_ptr + key_head * stride_vh, s, end, stride_vn, True, UPCAST, D, BLOCK_D)
    dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    h = key_head * REPEATS
    dk, dv = _key_gradients(
        dk,
        dv,
        k,
        v,
        grad_ptr + h * stride_gh,
        q_ptr + h * stride_qh,
        lse_ptr + h,
        delta_ptr + h,
        first,
        past,
        s,
        heads,
        stride_gn,
        stride_gh,
        stride_qn,
        stride_qh,
        scale,
        True,
        REPEATS,
        UPCAST,
        PRECISION,
        D,
        BLOCK_N,
        BLOCK_D,
    )
    dk, dv = _key_gradients(
        dk,
        dv,
        k,
        v,
        grad_ptr + h * stride_gh,
        q_ptr + h * stride_qh,
        lse_ptr + h,
        delta_ptr + h,
        past,
        end,
        s,
        heads,
        stride_gn,
        stride_gh,
        stride_qn,
        stride_qh,
        scale,
        False,
        REPEATS,
        UPCAST,
        PRECISION,
        D,
        BLOCK_N,
        BLOCK_D,
    )
    stride_on = tl.cast(heads // REPEATS, tl.int64) * D
    _store(grad_k_ptr + key_head * D, s, end, stride_on, dk * unit, D, BLOCK_D)
    _store(grad_v_ptr + key_head * D, s, end, stride_on, dv, D, BLOCK_D)


@jit
def prefix_gradients_kernel(
    grad_ptr,
    q_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    N,
    P,
    heads,
    stride_gn,
    stride_gh,
    stride_qn,
    stride_qh,
    stride_pkn,
    stride_pkh,
    stride_pvn,
    stride_pvh,
    stride_gkn,
    stride_gkh,
    stride_gvn,
    stride_gvh,
    stride_split,
    scale,
    unit,
    ADD: tl.constexpr,
    REPEATS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a tile of prefix keys and values, from a split of all tokens; ADD: to what is
    there, once, so that no order of programs shows."""
    key_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(2)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    blocks = tl.cdiv(N, BLOCK_N)
    first = (split * blocks // splits * BLOCK_N).to(tl.int32)
    end = tl.minimum((split + 1) * blocks // splits * BLOCK_N, N).to(tl.int32)
    k_ptr = prefix_k_ptr + key_head * stride_pkh
    v_ptr = prefix_v_ptr + key_head * stride_pvh
    k = _load(k_ptr, s, P, stride_pkn, True, UPCAST, D, BLOCK_D)
    v = _load(v_ptr, s, P, stride_pvn, True, UPCAST, D, BLOCK_D)
    dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    h = key_head * REPEATS
    dk, dv = _key_gradients(
        dk,
        dv,
        k,
        v,
        grad_ptr + h * stride_gh,
        q_ptr + h * stride_qh,
        lse_ptr + h,
        delta_ptr + h,
        first,
        end,
        s,
        heads,
        stride_gn,
        stride_gh,
        stride_qn,
        stride_qh,
        scale,
        False,
        REPEATS,
        UPCAST,
        PRECISION,
        D,
        BLOCK_N,
        BLOCK_D,
    )
    grad_k_ptr += split * stride_split + key_head * stride_gkh
    grad_v_ptr += split * stride_split + key_head * stride_gvh
    dk *= unit
    if ADD:
        _add(grad_k_ptr, s, P, stride_gkn, dk, D, BLOCK_D)
        _add(grad_v_ptr, s, P, stride_gvn, dv, D, BLOCK_D)
    else:
        _store(grad_k_ptr, s, P, stride_gkn, dk, D, BLOCK_D)
        _store(grad_v_ptr, s, P, stride_gvn, dv, D, BLOCK_D)
