// op:       relation, relation_bwd
// math:     scores s = scale a b^T of the student and z = teacher_scale c d^T of the teacher over the visible keys
//           KL: loss = w sum p (z - s) / sum p - lse(z) + lse(s), dS = w dloss (softmax(s) - softmax(z))
//           squared error: loss = w sum (s - z)^2 / n, dS = w dloss 2 (s - z) / n
//           da = scale dS b, db = scale dS^T a
// grad:     relation_bwd_rows, then relation_bwd_a and relation_bwd_b
// shapes:   visible: context[B], lengths[B], weights[B,T], seen[B,T,2]; fwd: a[B,T,H,D], b[B,S,H,D], c[B,T,H,E], d[B,S,H,E],
//           seen[B,T,2], loss[B,H,T], sums[B,H,T,2]; bwd_rows: context, lengths, weights, sums, dloss[B,H,T], rows[B,H,T,4];
//           bwd_a: a, b, c, d, rows, da[B,T,H,D]; bwd_b: a, b, c, d, rows, db[B,S,H,D]
// layout:   contiguous; the plan puts arguments into slots, an absent optional input is any read argument and never read
// launch:   linear; v1 64 threads a block, one row each (a query in fwd and bwd_a, a key in bwd_b); v2 256 threads, one tile of
//           16 rows each; backward once for every 128 dimensions, first to last
// cost:     2 B H T S (D + E) flops forward; backward recomputes scores for da and for db
// numerics: f32; online softmax of both models at once, in key order; masks leave a prefix of the keys visible, hidden keys
//           never count; a query without keys gives loss 0 and sums of MASKED
// source:   Wang et al. 2020 (MiniLM) eq. 5 and 7; Jiao et al. 2020 (TinyBERT) eq. 7; Milakov and Gimelshein 2018
// rungs:    v1 one row per thread, 4 of the other side at a time; v2 tiles of scores 16 x 16, operands and slopes in shared
//           memory

struct RelationParams {
    u32 batch, queries, keys, heads, dim, teacher_dim;
    u32 flags;
    float scale, teacher_scale;
    // Dimensions of da or db that this launch sums.
    u32 first, last;
};

// Dimensions of a range at most; rows and columns of a tile of scores.
#define DIM 128
#define TILE 16u

// Every mask leaves a prefix of the keys visible.
__device__ u32 visible_keys(const u32* context, const u32* lengths, const RelationParams& p, u32 b, u32 t) {
    u32 n = p.keys, mask = p.flags & 3u;
    if (mask != 0u) {
        u32 seen = t + 1u;
        if (mask == 2u) seen = max(seen, context[b]);
        n = min(n, seen);
    }
    if ((p.flags & 4u) != 0u) n = min(n, lengths[b]);
    return n;
}

// Of each query: how many keys it sees (exact: below 2^24) and what it weighs.
extern "C" __global__ void __launch_bounds__(64)
relation_visible(const u32* context, const u32* lengths, const float* weights, float* seen, RelationParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.queries) return;
    seen[2u * (u64)item] = (float)visible_keys(context, lengths, p, item / p.queries, item % p.queries);
    seen[2u * (u64)item + 1u] = weights[item];
}

// What backward needs of a query: visible keys, both log sum exps, the factor of its slopes.
extern "C" __global__ void __launch_bounds__(64)
relation_bwd_rows(const u32* context, const u32* lengths, const float* weights, const float* sums, const float* dloss, float* rows, RelationParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    u32 t = item % p.queries, b = item / (p.queries * p.heads), n = visible_keys(context, lengths, p, b, t);
    float factor = weights[b * p.queries + t] * dloss[item];
    if ((p.flags & 8u) != 0u) factor = factor * 2.0f / (float)max(n, 1u);
    rows += 4u * (u64)item;
    rows[0] = (float)n;
    rows[1] = sums[2u * (u64)item];
    rows[2] = sums[2u * (u64)item + 1u];
    rows[3] = factor;
}

// Row (b, n, h) of a tensor of `extent` rows of `dim`.
__device__ __forceinline__ const E* row_of(const E* x, const RelationParams& p, u32 b, u32 n, u32 h, u32 extent, u32 dim) {
    return x + (((u64)b * extent + n) * p.heads + h) * dim;
}

// Four rows from `first`; those past the end repeat the last of `count`.
__device__ __forceinline__ void four(u32* index, u32 first, u32 count) {
#pragma unroll
    for (u32 k = 0; k < 4u; k++) index[k] = min(first + k, count - 1u);
}

// score[k] = scale row . (row index[k] of x), rows of one head
__device__ __forceinline__ void dot4(float* score, const E* row, const E* x, const u32* index, const RelationParams& p, u32 dim, float scale) {
    u64 stride = (u64)p.heads * dim;
    const E *x0 = x + index[0] * stride, *x1 = x + index[1] * stride, *x2 = x + index[2] * stride, *x3 = x + index[3] * stride;
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
    for (u32 i = 0; i < dim; i++) {
        float value = ld(row[i]);
        s0 += value * ld(x0[i]);
        s1 += value * ld(x1[i]);
        s2 += value * ld(x2[i]);
        s3 += value * ld(x3[i]);
    }
    score[0] = s0 * scale;
    score[1] = s1 * scale;
    score[2] = s2 * scale;
    score[3] = s3 * scale;
}

// Largest score and sum of exponentials of student and teacher; the teacher's exponentials times what lies between the
// scores, or its squares.
struct Online {
    float most_s, total_s, most_z, total_z, apart;

    __device__ __forceinline__ void take(float s, float z, u32 flags) {
        if ((flags & 8u) != 0u) {
            apart += (s - z) * (s - z);
            return;
        }
        float larger_s = fmaxf(most_s, s), larger_z = fmaxf(most_z, z), correct = expf(most_z - larger_z), p = expf(z - larger_z);
        total_s = total_s * expf(most_s - larger_s) + expf(s - larger_s);
        total_z = total_z * correct + p;
        apart = apart * correct + p * (z - s);
        most_s = larger_s;
        most_z = larger_z;
    }

    __device__ __forceinline__ void join(const Online& other) {
        float larger_s = fmaxf(most_s, other.most_s), larger_z = fmaxf(most_z, other.most_z);
        float own = expf(most_z - larger_z), its = expf(other.most_z - larger_z);
        total_s = total_s * expf(most_s - larger_s) + other.total_s * expf(other.most_s - larger_s);
        total_z = total_z * own + other.total_z * its;
        apart = apart * own + other.apart * its;
        most_s = larger_s;
        most_z = larger_z;
    }
};

// Loss and sums of a query that sees n keys and weighs w.
__device__ __forceinline__ void finish(float* loss_out, float* sums_out, u32 flags, u32 n, float w, const Online& state) {
    float loss = 0.0f, lse_s = 0.0f, lse_z = 0.0f;
    if ((flags & 8u) != 0u) {
        if (n > 0u) loss = w * state.apart / (float)n;
    } else if (n == 0u) {
        lse_s = lse_z = MASKED;
    } else {
        lse_s = state.most_s + logf(state.total_s);
        lse_z = state.most_z + logf(state.total_z);
        loss = w * (state.apart / state.total_z - lse_z + lse_s);
    }
    *loss_out = loss;
    sums_out[0] = lse_s;
    sums_out[1] = lse_z;
}

extern "C" __global__ void __launch_bounds__(64)
relation_fwd(const E* a, const E* b, const E* c, const E* d, const float* seen, float* loss, float* sums, RelationParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    u32 t = item % p.queries, h = item / p.queries % p.heads, n_b = item / (p.queries * p.heads);
    seen += 2u * ((u64)n_b * p.queries + t);
    u32 n = (u32)seen[0];
    const E *query = row_of(a, p, n_b, t, h, p.queries, p.dim), *taught = row_of(c, p, n_b, t, h, p.queries, p.teacher_dim);
    const E *keys = row_of(b, p, n_b, 0u, h, p.keys, p.dim), *their = row_of(d, p, n_b, 0u, h, p.keys, p.teacher_dim);
    Online state = {MASKED, 0.0f, MASKED, 0.0f, 0.0f};
    for (u32 s = 0; s < n; s += 4u) {
        // Rows past the end repeat the last visible key and count nothing.
        u32 key[4];
        float own[4], other[4];
        four(key, s, n);
        dot4(own, query, keys, key, p, p.dim, p.scale);
        dot4(other, taught, their, key, p, p.teacher_dim, p.teacher_scale);
#pragma unroll
        for (u32 k = 0; k < 4u; k++)
            if (s + k < n) state.take(own[k], other[k], p.flags);
    }
    finish(loss + item, sums + 2u * (u64)item, p.flags, n, seen[1], state);
}

// Slope of the loss in a score: `row` is what relation_bwd_rows kept of the query.
__device__ __forceinline__ float slope(float s, float z, const float* row, u32 flags) {
    return row[3] * ((flags & 8u) != 0u ? s - z : expf(s - row[1]) - expf(z - row[2]));
}

// sum[i] += weighted dimension first + i of four rows of x
__device__ __forceinline__ void add4(float* sum, const float* weight, const E* x, const u32* index, const RelationParams& p) {
    u64 stride = (u64)p.heads * p.dim;
    const E *x0 = x + index[0] * stride + p.first, *x1 = x + index[1] * stride + p.first;
    const E *x2 = x + index[2] * stride + p.first, *x3 = x + index[3] * stride + p.first;
    for (u32 i = 0; i < p.last - p.first; i++)
        sum[i] += weight[0] * ld(x0[i]) + weight[1] * ld(x1[i]) + weight[2] * ld(x2[i]) + weight[3] * ld(x3[i]);
}

extern "C" __global__ void __launch_bounds__(64)
relation_bwd_a(const E* a, const E* b, const E* c, const E* d, const float* rows, E* da, RelationParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    u32 t = item % p.queries, h = item / p.queries % p.heads, n_b = item / (p.queries * p.heads);
    rows += 4u * (u64)item;
    u32 n = (u32)rows[0];
    const E *query = row_of(a, p, n_b, t, h, p.queries, p.dim), *taught = row_of(c, p, n_b, t, h, p.queries, p.teacher_dim);
    const E *keys = row_of(b, p, n_b, 0u, h, p.keys, p.dim), *their = row_of(d, p, n_b, 0u, h, p.keys, p.teacher_dim);
    float sum[DIM];
    for (u32 i = 0; i < p.last - p.first; i++) sum[i] = 0.0f;
    for (u32 s = 0; s < n; s += 4u) {
        u32 key[4];
        float own[4], other[4];
        four(key, s, n);
        dot4(own, query, keys, key, p, p.dim, p.scale);
        dot4(other, taught, their, key, p, p.teacher_dim, p.teacher_scale);
#pragma unroll
        for (u32 k = 0; k < 4u; k++) own[k] = s + k < n ? slope(own[k], other[k], rows, p.flags) : 0.0f;
        add4(sum, own, keys, key, p);
    }
    da += query - a + p.first;
    for (u32 i = 0; i < p.last - p.first; i++) da[i] = st(sum[i] * p.scale);
}

extern "C" __global__ void __launch_bounds__(64)
relation_bwd_b(const E* a, const E* b, const E* c, const E* d, const float* rows, E* db, RelationParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.keys) return;
    u32 s = item % p.keys, h = item / p.keys % p.heads, n_b = item / (p.keys * p.heads);
    const E *key = row_of(b, p, n_b, s, h, p.keys, p.dim), *taught = row_of(d, p, n_b, s, h, p.keys, p.teacher_dim);
    const E *queries = row_of(a, p, n_b, 0u, h, p.queries, p.dim), *their = row_of(c, p, n_b, 0u, h, p.queries, p.teacher_dim);
    rows += 4u * ((u64)n_b * p.heads + h) * p.queries;
    float sum[DIM];
    for (u32 i = 0; i < p.last - p.first; i++) sum[i] = 0.0f;
    for (u32 t = 0; t < p.queries; t += 4u) {
        // Rows past the end repeat the last query and must not count; the others count where they see this key.
        u32 query[4];
        bool live[4];
        float own[4], other[4];
        four(query, t, p.queries);
#pragma unroll
        for (u32 k = 0; k < 4u; k++) live[k] = (float)s < rows[4u * (u64)query[k]] && t + k < p.queries;
        if (!(live[0] || live[1] || live[2] || live[3])) continue;
        dot4(own, key, queries, query, p, p.dim, p.scale);
        dot4(other, taught, their, query, p, p.teacher_dim, p.teacher_scale);
#pragma unroll
        for (u32 k = 0; k < 4u; k++) own[k] = live[k] ? slope(own[k], other[k], rows + 4u * (u64)query[k], p.flags) : 0.0f;
        add4(sum, own, queries, query, p);
    }
    db += key - b + p.first;
    for (u32 i = 0; i < p.last - p.first; i++) db[i] = st(sum[i] * p.scale);
}

// Operands of a tile; rows of the right one and of the slopes lie 17 apart, so that sixteen of one column touch all banks.
struct Shared {
    float left[TILE][TILE], right[TILE][TILE + 1], slopes[TILE][TILE + 1];
};

// Score of query i against key j of a tile. Thread (i, j) brings element j of query row i and of key row i.
__device__ __forceinline__ float tile_score(Shared& shared, const E* query, const E* key, u32 dim, float scale) {
    u32 i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    float sum = 0.0f;
    for (u32 d = 0; d < dim; d += TILE) {
        bool inside = d + j < dim;
        shared.left[i][j] = inside ? ld(query[d + j]) : 0.0f;
        shared.right[i][j] = inside ? ld(key[d + j]) : 0.0f;
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < TILE; k++) sum += shared.left[i][k] * shared.right[j][k];
        __syncthreads();
    }
    return sum * scale;
}

// Batch element, head and first row of a block's tile among `extent` rows.
struct Tile { u32 b, h, start; };
__device__ __forceinline__ Tile tile_of(const RelationParams& p, u32 extent) {
    u32 item = linear_block(), tiles = div_up(extent, TILE), head = item / tiles;
    return Tile{head / p.heads, head % p.heads, item % tiles * TILE};
}

extern "C" __global__ void __launch_bounds__(256)
relation_fwd_tiles(const E* a, const E* b, const E* c, const E* d, const float* seen, float* loss, float* sums, RelationParams p) {
    __shared__ Shared shared;
    __shared__ Online states[TILE][TILE];
    u32 i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    Tile tile = tile_of(p, p.queries);
    if (tile.b >= p.batch) return;
    u32 t = min(tile.start + i, p.queries - 1u);
    seen += 2u * ((u64)tile.b * p.queries + t);
    u32 n = (u32)seen[0];
    const E *query = row_of(a, p, tile.b, t, tile.h, p.queries, p.dim), *taught = row_of(c, p, tile.b, t, tile.h, p.queries, p.teacher_dim);
    Online state = {MASKED, 0.0f, MASKED, 0.0f, 0.0f};
    for (u32 first = 0; first < p.keys; first += TILE) {
        u32 brought = min(first + i, p.keys - 1u);
        float s = tile_score(shared, query, row_of(b, p, tile.b, brought, tile.h, p.keys, p.dim), p.dim, p.scale);
        float z = tile_score(shared, taught, row_of(d, p, tile.b, brought, tile.h, p.keys, p.teacher_dim), p.teacher_dim, p.teacher_scale);
        if (first + j < n) state.take(s, z, p.flags);
    }
    states[i][j] = state;
    __syncthreads();
    if (j > 0u || tile.start + i >= p.queries) return;
    for (u32 k = 1; k < TILE; k++) state.join(states[i][k]);
    u64 item = ((u64)tile.b * p.heads + tile.h) * p.queries + t;
    finish(loss + item, sums + 2u * item, p.flags, n, seen[1], state);
}

// total[m] += sum over k of weight(k) (dimension first + 16 m + j of the row that thread row k brings)
template <bool BY_KEY>
__device__ __forceinline__ void tile_add(float* total, Shared& shared, const E* row, const RelationParams& p) {
    u32 i = threadIdx.x / TILE, j = threadIdx.x % TILE;
#pragma unroll
    for (u32 m = 0; m < DIM / TILE; m++) {
        u32 d = p.first + m * TILE + j;
        shared.right[i][j] = d < p.last ? ld(row[d]) : 0.0f;
        __syncthreads();
        float sum = 0.0f;
#pragma unroll
        for (u32 k = 0; k < TILE; k++) sum += (BY_KEY ? shared.slopes[k][i] : shared.slopes[i][k]) * shared.right[k][j];
        total[m] += sum;
        __syncthreads();
    }
}

__device__ __forceinline__ void tile_store(E* out, const float* total, const RelationParams& p) {
#pragma unroll
    for (u32 m = 0; m < DIM / TILE; m++) {
        u32 d = p.first + m * TILE + threadIdx.x % TILE;
        if (d < p.last) out[d] = st(total[m] * p.scale);
    }
}

extern "C" __global__ void __launch_bounds__(256)
relation_bwd_a_tiles(const E* a, const E* b, const E* c, const E* d, const float* rows, E* da, RelationParams p) {
    __shared__ Shared shared;
    u32 i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    Tile tile = tile_of(p, p.queries);
    if (tile.b >= p.batch) return;
    u32 t = min(tile.start + i, p.queries - 1u);
    rows += 4u * (((u64)tile.b * p.heads + tile.h) * p.queries + t);
    u32 n = (u32)rows[0];
    const E *query = row_of(a, p, tile.b, t, tile.h, p.queries, p.dim), *taught = row_of(c, p, tile.b, t, tile.h, p.queries, p.teacher_dim);
    float total[DIM / TILE] = {};
    for (u32 first = 0; first < p.keys; first += TILE) {
        u32 brought = min(first + i, p.keys - 1u);
        const E* key = row_of(b, p, tile.b, brought, tile.h, p.keys, p.dim);
        float s = tile_score(shared, query, key, p.dim, p.scale);
        float z = tile_score(shared, taught, row_of(d, p, tile.b, brought, tile.h, p.keys, p.teacher_dim), p.teacher_dim, p.teacher_scale);
        shared.slopes[i][j] = first + j < n ? slope(s, z, rows, p.flags) : 0.0f;
        tile_add<false>(total, shared, key, p);
    }
    if (tile.start + i < p.queries) tile_store(da + (query - a), total, p);
}

extern "C" __global__ void __launch_bounds__(256)
relation_bwd_b_tiles(const E* a, const E* b, const E* c, const E* d, const float* rows, E* db, RelationParams p) {
    __shared__ Shared shared;
    u32 i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    Tile tile = tile_of(p, p.keys);
    if (tile.b >= p.batch) return;
    u32 brought = min(tile.start + i, p.keys - 1u);
    const E *key = row_of(b, p, tile.b, brought, tile.h, p.keys, p.dim), *taught = row_of(d, p, tile.b, brought, tile.h, p.keys, p.teacher_dim);
    rows += 4u * ((u64)tile.b * p.heads + tile.h) * p.queries;
    float total[DIM / TILE] = {};
    for (u32 first = 0; first < p.queries; first += TILE) {
        u32 t = min(first + i, p.queries - 1u);
        const E* query = row_of(a, p, tile.b, t, tile.h, p.queries, p.dim);
        const float* row = rows + 4u * (u64)t;
        float s = tile_score(shared, query, key, p.dim, p.scale);
        float z = tile_score(shared, row_of(c, p, tile.b, t, tile.h, p.queries, p.teacher_dim), taught, p.teacher_dim, p.teacher_scale);
        shared.slopes[i][j] = first + i < p.queries && tile.start + j < (u32)row[0] ? slope(s, z, row, p.flags) : 0.0f;
        tile_add<true>(total, shared, query, p);
    }
    if (tile.start + i < p.keys) tile_store(db + (key - b), total, p);
}
