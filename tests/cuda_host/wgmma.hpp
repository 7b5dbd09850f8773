// What cuda/wgmma.cuh wraps, on the host: barriers of shared memory with phases and bytes, copies by tensor map, products of
// warp groups. Copies take place at the last moment (when a thread waits for their barrier) in every other block, at the first
// in the others; products when they are waited for, while their sums are NaN. So a missing wait reads NaN or what is not meant.
#pragma once

namespace host {

// Shared memory as 18-bit addresses; what lies below belongs to the system, as on a GPU.
static const unsigned SHARED_BASE = 1024;

static unsigned shared_offset(const void* pointer, size_t bytes) {
    auto p = (const unsigned char*)pointer;
    if (!dynamic_bytes || p < dynamic || p + bytes > dynamic + dynamic_bytes) fail("%zu bytes that are not in dynamic shared memory", bytes);
    return SHARED_BASE + (unsigned)(p - dynamic);
}

// A tensor map as src/device/cuda/host.rs writes it: elements of a row, rows, planes.
struct Map {
    uint64_t mark, address;
    // Bytes from row to row and from plane to plane.
    uint64_t strides[2];
    unsigned dims[3], box[3];
    unsigned element_bytes;
};
static const uint64_t MAP_MARK = 0x504d524f534e4554ull, BARRIER_MARK = 0x72656972726162ull;

// A box of a map, or `bytes` from an address where they are not 0.
struct BulkCopy { unsigned char* to; Map map; int at[3]; const void* from; unsigned bytes; };

struct MemoryBarrier {
    uint64_t* place;
    // Arrivals of a phase, arrivals and bytes that are missing in this one, and how many phases have ended.
    unsigned count, pending;
    long bytes;
    unsigned phase;
    std::vector<BulkCopy> copies;
    // Who made it, how many barriers of threads had passed then, and whether the copy engine was told.
    unsigned maker, made;
    bool published;
    // The same of barriers of the cluster, for other blocks.
    unsigned made_in_cluster;
};

// Sums, and operands in registers, that a thread of a warp group may not touch: their values are kept here, NaN stands in the registers.
struct Sums {
    const void* registers[WARP_GROUP_LANES];
    unsigned each, users;
    std::vector<unsigned> values;
};
// `left`: four words of each lane that hold a, where it does not lie in memory. `bytes`: signed bytes and i32 sums, else 16-bit
// elements and f32 sums. `kept`: a holds two of four, and the lanes' metadata says which.
struct Product {
    uint64_t a, b;
    unsigned columns;
    bool a_blocks, b_blocks, add;
    void* sums;
    const unsigned* left;
    bool bytes, kept;
    unsigned selector, metadata;
    std::vector<unsigned> all_metadata;
    // Elements of k of one instruction: 32 bytes of a.
    unsigned depth() const { return (bytes ? 32 : 16) * (kept ? 2 : 1); }
};
struct WarpGroup {
    bool fenced;
    std::vector<Sums> sums;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
};

static std::vector<MemoryBarrier> barriers;
// Threads that have arrived at a numbered barrier without waiting, and the width they gave.
static unsigned named_arrived[MOST_BLOCKS][16], named_width[MOST_BLOCKS][16];
static WarpGroup warp_groups[MOST_THREADS / WARP_GROUP_LANES];
static bool copies_at_once;
// Of a cluster, the block that goes on while it can, so that only what it waits for keeps it from others; none where they keep step.
static unsigned leader;
static bool leads;

static void reset_groups(unsigned order) {
    barriers.clear();
    for (auto& g : warp_groups) g = {};
    memset(named_arrived, 0, sizeof named_arrived);
    copies_at_once = order % 2;
    leads = order % 3 != 2;
    leader = order % 3 == 0 ? 0 : cluster_blocks - 1;
}

static MemoryBarrier& barrier_at(uint64_t* place) {
    check_aligned(place, 8);
    shared_offset(place, 8);
    for (auto& b : barriers) {
        if (b.place != place) continue;
        if (*place != BARRIER_MARK) fail("the mbarrier at byte %u of shared memory was overwritten", shared_offset(place, 8) - SHARED_BASE);
        if (b.maker != current && b.made == passed[block_of(b.maker)]) fail("an mbarrier is used by a thread that no barrier has kept behind its initialization");
        if (block_of(b.maker) != block_of(current) && b.made_in_cluster == cluster_passed) fail("an mbarrier of another block is used before a barrier of the cluster");
        return b;
    }
    fail("the mbarrier at byte %u of shared memory is not initialized", shared_offset(place, 8) - SHARED_BASE);
}

static void barrier_init(uint64_t* place, unsigned count) {
    check_aligned(place, 8);
    shared_offset(place, 8);
    for (auto& b : barriers)
        if (b.place == place) fail("an mbarrier is initialized twice");
    *place = BARRIER_MARK;
    barriers.push_back({place, count, count, 0, 0, {}, current, passed[block_of(current)], false, cluster_passed});
}

static void end_phase(MemoryBarrier& b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.count;
}

// Chunks of 16 bytes change places within 128 bytes, by address bits 7 to 9.
static unsigned turned(unsigned address) { return address ^ (address >> 7 & 7u) << 4; }

static void copy_box(const BulkCopy& c) {
    const Map& m = c.map;
    unsigned row_bytes = m.box[0] * m.element_bytes, base = shared_offset(c.to, 1), row = 0;
    for (unsigned z = 0; z < m.box[2]; z++) {
        for (unsigned y = 0; y < m.box[1]; y++, row++) {
            for (unsigned x = 0; x < m.box[0]; x++) {
                auto to = dynamic + (turned(base + row * row_bytes + x * m.element_bytes) - SHARED_BASE);
                uint64_t at[3] = {(uint64_t)((int64_t)c.at[0] + x), (uint64_t)((int64_t)c.at[1] + y), (uint64_t)((int64_t)c.at[2] + z)};
                // Negative coordinates are large here.
                bool inside = at[0] < m.dims[0] && at[1] < m.dims[1] && at[2] < m.dims[2];
                if (inside) memcpy(to, (const char*)m.address + at[0] * m.element_bytes + at[1] * m.strides[0] + at[2] * m.strides[1], m.element_bytes);
                else memset(to, 0, m.element_bytes);
            }
        }
    }
}

static long box_bytes(const Map& m) { return (long)m.box[0] * m.box[1] * m.box[2] * m.element_bytes; }
static long copied_bytes(const BulkCopy& c) { return c.bytes ? (long)c.bytes : box_bytes(c.map); }

// Another block's shared memory in place of the running thread's own, for as long as this lives.
struct InBlock {
    unsigned char* own = dynamic;
    explicit InBlock(unsigned block) {
        if (block >= cluster_blocks) fail("block %u of a cluster of %u", block, cluster_blocks);
        bool ended = true;
        for (unsigned i = 0; i < blockDim.x && ended; i++) ended = threads[block * blockDim.x + i].state == State::Done;
        if (ended) fail("shared memory of a block that has ended");
        dynamic = regions[block];
    }
    ~InBlock() { dynamic = own; }
    // What lies here where `place` lies in the own block.
    template <class T> T* at(T* place) const { return (T*)(dynamic + ((unsigned char*)place - own)); }
};

static void run_copies(MemoryBarrier& b) {
    InBlock here(block_of(b.maker));
    for (const BulkCopy& c : b.copies) {
        if (c.bytes) memcpy(c.to, c.from, c.bytes);
        else copy_box(c);
        b.bytes -= copied_bytes(c);
    }
    b.copies.clear();
    end_phase(b);
}

static void arrive(uint64_t* place, unsigned bytes) {
    MemoryBarrier& b = barrier_at(place);
    if (!b.pending) fail("an mbarrier of %u arrivals gets one more, before its phase has ended", b.count);
    b.bytes += bytes;
    b.pending--;
    if (b.copies.empty()) end_phase(b);
}

static void start_copy(const BulkCopy& c, uint64_t* place) {
    MemoryBarrier& b = barrier_at(place);
    if (!b.published) fail("a copy to an mbarrier without the fence after its initialization");
    b.copies.push_back(c);
    if (copies_at_once) run_copies(b);
}

static void bulk_copy(void* to, const void* map, uint64_t* place, int x, int y, int z) {
    BulkCopy c = {};
    check_aligned(map, 64);
    memcpy(&c.map, map, sizeof c.map);
    if (c.map.mark != MAP_MARK) fail("no tensor map");
    c.to = (unsigned char*)to;
    c.at[0] = x, c.at[1] = y, c.at[2] = z;
    // The turn by 128 bytes repeats every 1,024.
    if (shared_offset(to, (size_t)box_bytes(c.map)) % 1024) fail("a turned tile at byte %u of shared memory: no multiple of 1,024", shared_offset(to, 1) - SHARED_BASE);
    start_copy(c, place);
}

// The same box to the same place of every block of the cluster that `blocks` names, for each one's own barrier.
static void bulk_copy_cluster(void* to, const void* map, uint64_t* place, int x, int y, int z, unsigned blocks) {
    if (blocks >> cluster_blocks || !blocks) fail("a copy to blocks %x of a cluster of %u", blocks, cluster_blocks);
    for (unsigned block = 0; block < cluster_blocks; block++) {
        if (!(blocks >> block & 1)) continue;
        InBlock there(block);
        bulk_copy(there.at((unsigned char*)to), map, there.at(place), x, y, z);
    }
}

static void arrive_at(uint64_t* place, unsigned block) {
    InBlock there(block);
    arrive(there.at(place), 0);
}

static void cluster_wait() {
    threads[current].state = State::Cluster;
    threads[current].line = 0;
    yield();
}

static void bulk_copy_bytes(void* to, const void* from, uint64_t* place, unsigned bytes) {
    check_aligned(to, 16);
    check_aligned(from, 16);
    if (!bytes || bytes % 16) fail("a bulk copy of %u bytes", bytes);
    shared_offset(to, bytes);
    BulkCopy c = {};
    c.to = (unsigned char*)to;
    c.from = from;
    c.bytes = bytes;
    start_copy(c, place);
}

static bool passes(const Thread& t) { return (barrier_at((uint64_t*)t.operands).phase & 1u) != t.line; }

static void barrier_wait(uint64_t* place, unsigned parity) {
    if (parity > 1) fail("parity %u", parity);
    barrier_at(place);
    Thread& t = threads[current];
    t.operands = place;
    t.line = parity;
    if (passes(t)) return;
    t.state = State::Waiting;
    yield();
}

static void named_wait(unsigned number, unsigned count) {
    if (number > 15 || count == 0 || count % LANES || count > blockDim.x) fail("a barrier with number %u of %u threads", number, count);
    Thread& t = threads[current];
    t.state = State::Named;
    t.line = number;
    t.width = count;
    yield();
}

static void named_arrival(unsigned number, unsigned count) {
    if (number > 15 || count == 0 || count % LANES || count > blockDim.x) fail("a barrier with number %u of %u threads", number, count);
    unsigned &arrived = named_arrived[block_of(current)][number], &width = named_width[block_of(current)][number];
    if (arrived && width != count) fail("barrier %u of %u threads and of %u", number, width, count);
    width = count;
    if (++arrived > count) fail("more than %u threads have come to barrier %u", count, number);
}

static bool complete_named(unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        if (threads[i].state != State::Named) continue;
        unsigned block = block_of(i), first = block * blockDim.x, last = first + blockDim.x;
        unsigned number = threads[i].line, width = threads[i].width, come = named_arrived[block][number];
        for (unsigned j = first; j < last; j++) come += threads[j].state == State::Named && threads[j].line == number && threads[j].width == width;
        if (come > width) fail("%u threads at barrier %u of %u", come, number, width);
        if (come < width) continue;
        passed[block]++;
        named_arrived[block][number] = 0;
        for (unsigned j = first; j < last; j++)
            if (threads[j].state == State::Named && threads[j].line == number) threads[j].state = State::Ready;
        return true;
    }
    return false;
}

static bool complete_waits(unsigned count) {
    bool any = complete_named(count);
    unsigned parts = leads ? cluster_blocks : 1, each = count / parts;
    for (unsigned n = 0; n < parts && !any; n++) {
        unsigned first = leads ? (leader + n) % cluster_blocks * each : 0;
        // Copies are late: only where nobody goes on without them.
        for (unsigned late = 0; late < 2 && !any; late++) {
            for (unsigned i = first; i < first + each; i++) {
                if (threads[i].state != State::Waiting) continue;
                enter(i);
                MemoryBarrier& b = barrier_at((uint64_t*)threads[i].operands);
                if (late && !b.pending) run_copies(b);
                if (!passes(threads[i])) continue;
                threads[i].state = State::Ready;
                any = true;
            }
        }
    }
    return any;
}

static void report_waits(unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        if (threads[i].state != State::Waiting) continue;
        enter(i);
        const MemoryBarrier& b = barrier_at((uint64_t*)threads[i].operands);
        fail("deadlock: waits for parity %u of the mbarrier at byte %u of shared memory, which is in phase %u and misses %u of %u arrivals and %ld bytes",
             threads[i].line, shared_offset(b.place, 8) - SHARED_BASE, b.phase, b.pending, b.count, b.bytes);
    }
}

static void check_finished() {
    for (unsigned i = 0; i < MOST_BLOCKS * 16; i++)
        if (named_arrived[i / 16][i % 16]) fail("the block has ended while %u threads have arrived at barrier %u", named_arrived[i / 16][i % 16], i % 16);
    for (const auto& b : barriers)
        if (!b.copies.empty() || b.bytes) fail("the block has ended with copies in flight");
    for (const auto& g : warp_groups)
        if (!g.open.empty() || !g.groups.empty() || !g.sums.empty()) fail("the block has ended with products in flight");
}

// Element (index of m or n, k) of an operand in shared memory, by its descriptor.
static double operand_value(uint64_t descriptor, bool blocks, bool bytes, unsigned index, unsigned k) {
    unsigned start = (unsigned)(descriptor & 0x3fff) << 4, leading = (unsigned)(descriptor >> 16 & 0x3fff) << 4, stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4;
    unsigned address = start, size = bytes ? 1 : 2;
    if (blocks) address += index / 64 * leading + index % 64 * 2 + k / 8 * stride + k % 8 * 128;
    else address += index / 8 * stride + index % 8 * 128 + k * size;
    address = turned(address);
    if (address < SHARED_BASE || address + size > SHARED_BASE + dynamic_bytes) fail("an operand reaches to byte %d of %u of shared memory", (int)(address - SHARED_BASE), dynamic_bytes);
    if (unfenced[(address - SHARED_BASE) / 16 + block_of(current) * (MOST_SHARED / 16)]) fail("an operand that a thread has written without a proxy fence behind it");
    if (bytes) return (signed char)dynamic[address - SHARED_BASE];
    unsigned short value;
    memcpy(&value, dynamic + (address - SHARED_BASE), 2);
    return element_value(value);
}

// `width`: bytes along k that one instruction reads.
static void check_descriptor(uint64_t descriptor, bool blocks, unsigned width) {
    if (descriptor >> 62 != 1) fail("an operand's descriptor without the turn by 128 bytes");
    if (descriptor >> 49 & 7) fail("an operand's descriptor with a base offset");
    if (descriptor & ((3ull << 14) | (3ull << 30) | (3ull << 46) | (0x3ffull << 52))) fail("an operand's descriptor with bits that must be 0");
    unsigned start = (unsigned)(descriptor & 0x3fff) << 4;
    if (blocks ? start % 1024 : start % 128 + width > 128 || start % 1024 >= 128) fail("an operand that starts at byte %u of a turned tile", start % 1024);
}

static Sums* find_sums(WarpGroup& g, const void* first) {
    for (Sums& s : g.sums)
        if (s.registers[0] == first) return &s;
    return nullptr;
}

// Takes `each` words of every lane away from the threads, until the products that use them are done.
static void use_sums(WarpGroup& g, void** lanes, unsigned each, const void* (*of)(const Product&)) {
    Sums* s = find_sums(g, of(*(const Product*)lanes[0]));
    if (!s) {
        if (!g.fenced) fail("wgmma without wgmma.fence after its registers were used");
        g.sums.push_back({{}, each, 0, std::vector<unsigned>(WARP_GROUP_LANES * each)});
        s = &g.sums.back();
        for (unsigned i = 0; i < WARP_GROUP_LANES; i++) {
            s->registers[i] = of(*(const Product*)lanes[i]);
            memcpy(&s->values[i * each], s->registers[i], each * 4);
            memset((void*)s->registers[i], 0xff, each * 4);
        }
    }
    if (s->each != each) fail("registers are used in two ways at once");
    s->users++;
}

// Element (row, k) of an operand in registers: those of each warp's 16 rows are the words of mma_16816, of mma_16832_s8 for bytes.
static double register_value(const Sums& s, bool bytes, unsigned row, unsigned k) {
    unsigned each = bytes ? 4 : 2, lane = row / 16 * LANES + row % 8 * 4 + k / each % 4;
    unsigned word = s.values[lane * 4 + row % 16 / 8 + k / (4 * each) * 2];
    if (bytes) return (signed char)(word >> k % 4 * 8);
    return element_value((unsigned short)(word >> k % 2 * 16));
}

// Place of kept element j of a row in its four. 16-bit: of a quad, lane 2 SELECTOR has the first 16 columns, row g in the low half
// and row g + 8 in the high one, and the next lane the others. Bytes: lanes 0 and 1 have the first 32 columns of rows g and g + 8,
// lanes 2 and 3 the others.
static unsigned place_value(const Product& p, unsigned row, unsigned j) {
    unsigned quad = row / 16 * LANES + row % 8 * 4, lower = row % 16 / 8;
    if (p.bytes) return p.all_metadata[quad + lower + j / 16 * 2] >> j % 16 * 2 & 3u;
    return p.all_metadata[quad + 2 * p.selector + j / 8] >> (16 * lower + j % 8 * 2) & 3u;
}

static void run_product(WarpGroup& g, const Product& p) {
    Sums *s = find_sums(g, p.sums), *left = p.left ? find_sums(g, p.left) : nullptr;
    unsigned depth = p.depth();
    std::vector<double> a(64 * depth), b(depth * p.columns);
    for (unsigned i = 0; i < 64; i++) {
        for (unsigned j = 0; j < (p.kept ? depth / 2 : depth); j++) {
            unsigned k = p.kept ? j / 2 * 4 + place_value(p, i, j) : j;
            if (p.kept && j % 2 && place_value(p, i, j) <= place_value(p, i, j - 1)) fail("metadata of a row of 2:4 values does not ascend");
            a[i * depth + k] = left ? register_value(*left, p.bytes, i, j) : operand_value(p.a, p.a_blocks, p.bytes, i, j);
        }
    }
    for (unsigned j = 0; j < p.columns; j++)
        for (unsigned k = 0; k < depth; k++) b[j * depth + k] = operand_value(p.b, p.b_blocks, p.bytes, j, k);
    for (unsigned lane = 0; lane < WARP_GROUP_LANES; lane++) {
        unsigned* d = &s->values[lane * s->each];
        for (unsigned i = 0; i < s->each; i++) {
            unsigned row = lane / LANES * 16 + lane % LANES / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            double sum = !p.add ? 0.0 : p.bytes ? (double)(int)d[i] : (double)__uint_as_float(d[i]);
            for (unsigned k = 0; k < depth; k++) sum += a[row * depth + k] * b[column * depth + k];
            d[i] = p.bytes ? (unsigned)(long long)sum : __float_as_uint((float)sum);
        }
    }
    s->users--;
    if (left) left->users--;
}

// Hands finished sums back; nobody may have written over the NaN that stood for them.
static void return_sums(WarpGroup& g) {
    for (size_t at = 0; at < g.sums.size();) {
        Sums& s = g.sums[at];
        if (s.users) {
            at++;
            continue;
        }
        for (unsigned lane = 0; lane < WARP_GROUP_LANES; lane++) {
            auto bytes = (const unsigned char*)s.registers[lane];
            for (unsigned i = 0; i < s.each * 4; i++)
                if (bytes[i] != 0xff) fail("registers were written while a product was using them");
            memcpy((void*)s.registers[lane], &s.values[lane * s.each], s.each * 4);
        }
        g.sums.erase(g.sums.begin() + at);
        // Registers are the threads' own again.
        g.fenced = false;
    }
}

static WarpGroup& whole_group(unsigned count) {
    if (count != WARP_GROUP_LANES) fail("a warp group of %u threads", count);
    return warp_groups[current / WARP_GROUP_LANES];
}

static void complete_fence(void**, unsigned count) { whole_group(count).fenced = true; }

static void complete_commit(void**, unsigned count) {
    WarpGroup& g = whole_group(count);
    g.groups.push_back(std::move(g.open));
    g.open.clear();
}

template <int OPEN>
static void complete_group_wait(void**, unsigned count) {
    WarpGroup& g = whole_group(count);
    while (g.groups.size() > OPEN) {
        for (const Product& p : g.groups.front()) run_product(g, p);
        g.groups.erase(g.groups.begin());
    }
    return_sums(g);
}

static void complete_wgmma(void** lanes, unsigned count) {
    WarpGroup& g = whole_group(count);
    Product p = *(const Product*)lanes[0];
    for (unsigned i = 1; i < count; i++) {
        auto q = (const Product*)lanes[i];
        if (q->a != p.a || q->b != p.b || q->add != p.add) fail("lanes of a warp group name different operands");
    }
    if (p.kept)
        for (unsigned i = 0; i < count; i++) p.all_metadata.push_back(((const Product*)lanes[i])->metadata);
    if (!p.left) check_descriptor(p.a, p.a_blocks, 32);
    check_descriptor(p.b, p.b_blocks, p.kept ? 64 : 32);
    use_sums(g, lanes, p.columns / 2, [](const Product& p) -> const void* { return p.sums; });
    if (p.left) use_sums(g, lanes, 4, [](const Product& p) -> const void* { return p.left; });
    g.open.push_back(p);
}

static void group_collective(unsigned line, void (*complete)(void**, unsigned), void* operands) { collective(line, complete, operands, WARP_GROUP_LANES); }

}  // namespace host

static inline unsigned shared_address(const void* shared) { return host::shared_offset(shared, 1); }

static inline void mbarrier_init(unsigned long long* barrier, unsigned count) { host::barrier_init((uint64_t*)barrier, count); }
static inline void mbarrier_init_fence() {
    for (auto& b : host::barriers) b.published = true;
}
static inline void mbarrier_arrive(unsigned long long* barrier) { host::arrive((uint64_t*)barrier, 0); }
static inline void mbarrier_arrive_expect(unsigned long long* barrier, unsigned bytes) { host::arrive((uint64_t*)barrier, bytes); }
static inline void mbarrier_wait(unsigned long long* barrier, unsigned parity) { host::barrier_wait((uint64_t*)barrier, parity); }
static inline void tma_prefetch(const void*) {}
static inline void tma_load(void* shared, const void* map, unsigned long long* barrier, unsigned x, unsigned y, unsigned z) {
    host::bulk_copy(shared, map, (uint64_t*)barrier, (int)x, (int)y, (int)z);
}
static inline void tma_load_cluster(void* shared, const void* map, unsigned long long* barrier, unsigned x, unsigned y, unsigned z, unsigned blocks) {
    host::bulk_copy_cluster(shared, map, (uint64_t*)barrier, (int)x, (int)y, (int)z, blocks);
}
static inline void mbarrier_arrive_at(unsigned long long* barrier, unsigned block) { host::arrive_at((uint64_t*)barrier, block); }
static inline unsigned cluster_rank() { return host::block_of(host::current); }
static inline void cluster_barrier() { host::cluster_wait(); }
template <class T>
static inline void operand_store(T* operand, T value) {
    *operand = value;
    host::leave_unfenced(operand);
}
static inline void proxy_fence() {
    auto& own = host::threads[host::current].unfenced;
    for (unsigned at : own)
        if (host::unfenced[at] == host::current + 1) host::unfenced[at] = 0;
    own.clear();
}
static inline void bulk_load(void* shared, const void* global, unsigned long long* barrier, unsigned bytes) {
    host::bulk_copy_bytes(shared, global, (uint64_t*)barrier, bytes);
}
static inline void named_barrier(unsigned number, unsigned count) { host::named_wait(number, count); }
static inline void named_arrive(unsigned number, unsigned count) { host::named_arrival(number, count); }

template <unsigned COUNT>
static inline void registers_change() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "registers of a thread");
    host::group_collective(COUNT, host::complete_nothing, nullptr);
}
template <unsigned COUNT> static inline void registers_down() { registers_change<COUNT>(); }
template <unsigned COUNT> static inline void registers_up() { registers_change<COUNT>(); }

static inline void wgmma_fence() { host::group_collective(6, host::complete_fence, nullptr); }
static inline void wgmma_commit() { host::group_collective(7, host::complete_commit, nullptr); }
template <int OPEN> static inline void wgmma_wait() { host::group_collective(8, host::complete_group_wait<OPEN>, nullptr); }
template <class T> static inline void wgmma_hold(T&) {}

template <unsigned N, bool A_BLOCKS, bool B_BLOCKS>
static inline void wgmma(float (&d)[N / 2], unsigned long long a, unsigned long long b, unsigned add) {
    host::Product p{a, b, N, A_BLOCKS, B_BLOCKS, add != 0, d, nullptr};
    host::group_collective(9, host::complete_wgmma, &p);
}

template <unsigned N, bool B_BLOCKS>
static inline void wgmma_registers(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, unsigned add) {
    host::Product p{0, b, N, false, B_BLOCKS, add != 0, d, a};
    host::group_collective(10, host::complete_wgmma, &p);
}

template <unsigned N>
static inline void wgmma_s8(int (&d)[N / 2], unsigned long long a, unsigned long long b, unsigned add) {
    host::Product p{a, b, N, false, false, add != 0, d, nullptr, true};
    host::group_collective(11, host::complete_wgmma, &p);
}

template <unsigned N, unsigned SELECTOR>
static inline void wgmma_sparse(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, unsigned metadata, unsigned add) {
    static_assert(SELECTOR < 2, "a pair of the four lanes");
    host::Product p{0, b, N, false, false, add != 0, d, a, false, true, SELECTOR, metadata};
    host::group_collective(12, host::complete_wgmma, &p);
}

template <unsigned N>
static inline void wgmma_sparse_s8(int (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, unsigned metadata, unsigned add) {
    host::Product p{0, b, N, false, false, add != 0, d, a, true, true, 0, metadata};
    host::group_collective(13, host::complete_wgmma, &p);
}
