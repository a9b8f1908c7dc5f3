// Microbenchmarks of the machine: how fast can this processor read memory and multiply?
//
// These loops do nothing else, so they bound every kernel of the engine from above. Two ideas:
//  * A read loop is limited by how many cache-line misses it keeps in flight. One sequential stream leaves that
//    to the hardware prefetcher; several streams, or software prefetch, or both, reach further on some machines.
//    The loop variants are all timed, on huge pages, and the caller takes the best.
//  * An arithmetic loop keeps enough independent accumulators to hide the latency of the instruction, and
//    touches no memory. A multiplication and an addition count as two operations.
//
// Every sample is the time between two barriers that all threads pass, long enough for the clock's own cost not
// to matter and shorter than a scheduler's time slice; the best samples count.
// The file needs no -m flags: each function names its own target and runs only after a cpuid check.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// A loop whose accumulators live in memory would measure the compiler: unroll whatever the build's own
// level is.
#pragma GCC optimize("O3")
#endif

namespace {

volatile std::uint64_t sink;  // results end here so that no loop is optimised away

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ---------------------------------------------------------------------------------------------- threads

std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
    return cpus;
}

void pin_to(const std::vector<int>& cpus, int index) {
#if defined(__linux__)
    if (cpus.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[static_cast<std::size_t>(index) % cpus.size()], &set);
    // A refused pin only makes samples noisier, and the best sample is kept.
    (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
    (void)cpus;
    (void)index;
#endif
}

class Barrier {
  public:
    explicit Barrier(int parties) : parties_(parties) {}
    void wait() {
        const unsigned generation = generation_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties_) {
            waiting_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            return;
        }
        // Spin a while, then give the core away: our peer may be waiting for it.
        for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins)
            if (spins > 20000) std::this_thread::yield();
    }

  private:
    const int parties_;
    alignas(64) std::atomic<int> waiting_{0};
    alignas(64) std::atomic<unsigned> generation_{0};
};

// Runs work(thread, slice) on `threads` pinned threads for slice 0, 1, ... slices - 1, all threads together, again
// and again for about `seconds`. Returns the sum over slices of the shortest time in which all threads finished that
// slice. Slices are shorter than a scheduler's time slice, so that some sample of each escapes other programs even on
// a busy machine, where no whole pass would. prepare(thread) runs first, untimed, on each thread.
template <class Prepare, class Work>
double best_time(int threads, std::size_t slices, double seconds, Prepare prepare, Work work) {
    constexpr int min_passes = 4;
    Barrier barrier(threads);
    std::atomic<bool> stop{false};
    std::vector<double> best(slices, std::numeric_limits<double>::infinity());
    const std::vector<int> cpus = allowed_cpus();
    auto body = [&](int thread) {
        pin_to(cpus, thread);
        prepare(thread);
        for (std::size_t slice = 0; slice < slices; ++slice) work(thread, slice);  // warm-up
        const double begin = seconds_now();
        for (int pass = 1; !stop.load(std::memory_order_acquire); ++pass) {
            for (std::size_t slice = 0; slice < slices; ++slice) {
                barrier.wait();
                const double start = seconds_now();
                work(thread, slice);
                barrier.wait();
                const double took = seconds_now() - start;
                if (thread == 0 && took < best[slice]) best[slice] = took;
            }
            if (thread == 0) stop.store(pass >= min_passes && seconds_now() - begin > seconds);
            barrier.wait();  // nobody looks at `stop` before it is decided
        }
    };
    std::vector<std::thread> workers;
    for (int thread = 0; thread < threads; ++thread) workers.emplace_back(body, thread);
    for (std::thread& worker : workers) worker.join();
    return std::accumulate(best.begin(), best.end(), 0.0);
}

// ---------------------------------------------------------------------------------------------- features

struct Features {
    bool avx2_fma = false, avx512 = false, avx512_vnni = false, avx_vnni = false, avx512_bf16 = false;
    bool amx_int8 = false, amx_bf16 = false;
};

Features detect_features() {
    Features f;
#if defined(__x86_64__)
    __builtin_cpu_init();  // its answers include what the operating system saves on a context switch
    f.avx2_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    f.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) f.avx_vnni = f.avx2_fma && (eax >> 4 & 1);
#if defined(__linux__)
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 1)) {
        constexpr int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
        const bool granted = syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
        f.amx_int8 = granted && (edx >> 25 & 1);
        f.amx_bf16 = granted && (edx >> 22 & 1);
    }
#endif
#endif
    return f;
}

const Features& features() {
    static const Features found = detect_features();
    return found;
}

// ---------------------------------------------------------------------------------------------- reading

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kReadUnit = 4096;  // parts are multiples of this, which every variant divides evenly

// Each variant walks STREAMS equal pieces of [data, data + bytes) side by side, one or more cache lines of
// each in turn, and prefetches AHEAD bytes before itself (0 = leave it to the hardware).
template <int STREAMS, int AHEAD>
std::uint64_t read_portable(const char* data, std::size_t bytes) {
    using Vec = std::uint64_t __attribute__((vector_size(16)));
    Vec sum[4] = {};
    const std::size_t piece = bytes / STREAMS;
    for (std::size_t offset = 0; offset < piece; offset += 64)
        for (int s = 0; s < STREAMS; ++s) {
            const char* line = data + s * piece + offset;
            if (AHEAD) __builtin_prefetch(line + AHEAD, 0, 3);
            const Vec* words = reinterpret_cast<const Vec*>(line);
            for (int i = 0; i < 4; ++i) sum[i] |= words[i];
        }
    const Vec all = sum[0] | sum[1] | sum[2] | sum[3];
    return all[0] | all[1];
}

#if defined(__x86_64__)
template <int STREAMS, int AHEAD>
__attribute__((target("avx2"))) std::uint64_t read_avx2(const char* data, std::size_t bytes) {
    __m256i sum[8];
    for (__m256i& v : sum) v = _mm256_setzero_si256();
    const std::size_t piece = bytes / STREAMS;
    for (std::size_t offset = 0; offset < piece; offset += 64)
        for (int s = 0; s < STREAMS; ++s) {
            const char* line = data + s * piece + offset;
            if (AHEAD) _mm_prefetch(line + AHEAD, _MM_HINT_T0);
            const __m256i* words = reinterpret_cast<const __m256i*>(line);
            sum[2 * s & 7] = _mm256_or_si256(sum[2 * s & 7], _mm256_load_si256(words));
            sum[(2 * s + 1) & 7] = _mm256_or_si256(sum[(2 * s + 1) & 7], _mm256_load_si256(words + 1));
        }
    __m256i all = sum[0];
    for (int i = 1; i < 8; ++i) all = _mm256_or_si256(all, sum[i]);
    alignas(32) std::uint64_t out[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), all);
    return out[0] | out[1] | out[2] | out[3];
}

template <int STREAMS, int AHEAD>
__attribute__((target("avx512f"))) std::uint64_t read_avx512(const char* data, std::size_t bytes) {
    constexpr int lines = STREAMS >= 8 ? 1 : 8 / STREAMS;  // unrolled to 8 loads a round
    __m512i sum[8];
    for (__m512i& v : sum) v = _mm512_setzero_si512();
    const std::size_t piece = bytes / STREAMS;
    for (std::size_t offset = 0; offset < piece; offset += 64 * lines)
        for (int s = 0; s < STREAMS; ++s)
            for (int i = 0; i < lines; ++i) {
                const char* line = data + s * piece + offset + 64 * i;
                if (AHEAD) _mm_prefetch(line + AHEAD, _MM_HINT_T0);
                __m512i& v = sum[(s * lines + i) & 7];
                v = _mm512_or_si512(v, _mm512_load_si512(line));
            }
    __m512i all = sum[0];
    for (int i = 1; i < 8; ++i) all = _mm512_or_si512(all, sum[i]);
    alignas(64) std::uint64_t out[8];
    _mm512_store_si512(out, all);
    std::uint64_t folded = 0;
    for (std::uint64_t word : out) folded |= word;
    return folded;
}
#endif

using ReadLoop = std::uint64_t (*)(const char*, std::size_t);
struct ReadVariant {
    const char* name;
    ReadLoop loop;
};

#define READ_VARIANTS(loop)                                                                              \
    {{"1 stream", loop<1, 0>},           {"4 streams", loop<4, 0>},       {"8 streams", loop<8, 0>},     \
     {"1 stream, prefetch", loop<1, 8192>}, {"4 streams, prefetch", loop<4, 1024>},                      \
     {"8 streams, prefetch", loop<8, 1024>}}

std::vector<ReadVariant> read_variants() {
#if defined(__x86_64__)
    if (features().avx512) return READ_VARIANTS(read_avx512);
    if (features().avx2_fma) return READ_VARIANTS(read_avx2);
#endif
    return READ_VARIANTS(read_portable);
}
#undef READ_VARIANTS

// A zero-copy arena on huge pages where the system grants them; with 4 KiB pages address translation, not
// the memory, may be the limit that is measured.
class Arena {
  public:
    explicit Arena(std::size_t bytes) : size_(bytes + 2 * kHugePage) {
#if defined(__linux__)
        base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        (void)madvise(base_, size_, MADV_HUGEPAGE);  // advice only: refused where the kernel has none
#else
        base_ = std::malloc(size_);
        if (base_ == nullptr) throw std::bad_alloc();
#endif
        const auto address = reinterpret_cast<std::uintptr_t>(base_);
        data_ = reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() {
#if defined(__linux__)
        munmap(base_, size_);
#else
        std::free(base_);
#endif
    }
    char* data() const { return data_; }

  private:
    std::size_t size_;
    void* base_;
    char* data_;
};

std::vector<std::tuple<std::string, double>> read_rates(std::size_t bytes, int threads, double seconds) {
    if (threads < 1 || threads > 4096) throw std::invalid_argument("threads must be between 1 and 4096");
    constexpr std::size_t slice_bytes = std::size_t{16} << 20;  // of all threads: a fraction of a millisecond
    const auto count = static_cast<std::size_t>(threads);
    const std::size_t slices = std::max<std::size_t>(1, bytes / slice_bytes);
    const std::size_t slice = bytes / count / slices / kReadUnit * kReadUnit;  // bytes a thread reads in one slice
    if (slice == 0) throw std::invalid_argument("bytes must be at least 4096 a thread");
    const std::size_t part = slice * slices;
    const std::size_t repeats = std::max<std::size_t>(1, slice_bytes / (slice * count));
    const Arena arena(part * count);
    std::vector<std::tuple<std::string, double>> rates;
    bool touched = false;
    for (const ReadVariant& variant : read_variants()) {
        const double best = best_time(
            threads, slices, seconds,
            [&](int thread) {  // first touch on the thread that reads, so that the pages are near it
                if (!touched) std::memset(arena.data() + static_cast<std::size_t>(thread) * part, 1, part);
            },
            [&](int thread, std::size_t index) {
                const char* data = arena.data() + static_cast<std::size_t>(thread) * part + index * slice;
                std::uint64_t seen = 0;
                for (std::size_t repeat = 0; repeat < repeats; ++repeat) seen |= variant.loop(data, slice);
                sink = seen;
            });
        touched = true;
        rates.emplace_back(variant.name, static_cast<double>(part * count * repeats) / best);
    }
    return rates;
}

// ---------------------------------------------------------------------------------------------- arithmetic

// An empty asm statement that "uses" every sum after the loop keeps the loop from being optimised away.

void loop_fp32_portable(long rounds) {
    using Vec = float __attribute__((vector_size(16)));
    Vec sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = Vec{1, 1, 1, 1} * static_cast<float>(i);
    Vec factor = {0.5f, 0.5f, 0.5f, 0.5f}, addend = {1, 1, 1, 1};
    for (long round = 0; round < rounds; ++round) {
        for (Vec& v : sum) v = v * factor + addend;
    }
    float folded = 0;
    for (const Vec& v : sum) folded += v[0] + v[1] + v[2] + v[3];
    sink = static_cast<std::uint64_t>(folded);
}

void loop_int8_portable(long rounds) {
    // 16-bit products and sums: faster than any exact int8 dot product that plain C++ can express.
    using Vec = std::uint16_t __attribute__((vector_size(16)));
    Vec sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = Vec{} + static_cast<std::uint16_t>(i + 1);
    const Vec factor = Vec{} + static_cast<std::uint16_t>(sink | 3), addend = Vec{} + std::uint16_t{7};
    for (long round = 0; round < rounds; ++round) {
        for (Vec& v : sum) v = v * factor + addend;
    }
    std::uint64_t folded = 0;
    for (const Vec& v : sum) folded += v[0] + v[7];
    sink = folded;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void loop_fp32_avx2(long rounds) {
    __m256 sum[12];
    for (int i = 0; i < 12; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
    const __m256 factor = _mm256_set1_ps(0.5f), addend = _mm256_set1_ps(1.0f);
    for (long round = 0; round < rounds; ++round)
        for (__m256& v : sum) v = _mm256_fmadd_ps(v, factor, addend);
    for (const __m256& v : sum) asm volatile("" : : "x"(v));
}

__attribute__((target("avx512f"))) void loop_fp32_avx512(long rounds) {
    __m512 sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
    const __m512 factor = _mm512_set1_ps(0.5f), addend = _mm512_set1_ps(1.0f);
    for (long round = 0; round < rounds; ++round)
        for (__m512& v : sum) v = _mm512_fmadd_ps(v, factor, addend);
    for (const __m512& v : sum) asm volatile("" : : "v"(v));
}

__attribute__((target("avx2"))) void loop_int8_avx2(long rounds) {
    __m256i sum[8];
    for (__m256i& v : sum) v = _mm256_setzero_si256();
    __m256i left = _mm256_set1_epi8(3), right = _mm256_set1_epi8(5);
    const __m256i ones = _mm256_set1_epi16(1);
    for (long round = 0; round < rounds; ++round)
        for (__m256i& v : sum) {
            asm volatile("" : "+x"(left));  // otherwise the product of constants leaves the loop
            v = _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_maddubs_epi16(left, right), ones));
        }
    for (const __m256i& v : sum) asm volatile("" : : "x"(v));
}

__attribute__((target("avx2,avxvnni"))) void loop_int8_avx_vnni(long rounds) {
    __m256i sum[12];
    for (__m256i& v : sum) v = _mm256_setzero_si256();
    const __m256i left = _mm256_set1_epi8(3), right = _mm256_set1_epi8(5);
    for (long round = 0; round < rounds; ++round)
        for (__m256i& v : sum) v = _mm256_dpbusd_avx_epi32(v, left, right);
    for (const __m256i& v : sum) asm volatile("" : : "x"(v));
}

__attribute__((target("avx512f,avx512bw"))) void loop_int8_avx512(long rounds) {
    __m512i sum[8];
    for (__m512i& v : sum) v = _mm512_setzero_si512();
    __m512i left = _mm512_set1_epi8(3), right = _mm512_set1_epi8(5);
    const __m512i ones = _mm512_set1_epi16(1);
    for (long round = 0; round < rounds; ++round)
        for (__m512i& v : sum) {
            asm volatile("" : "+v"(left));
            v = _mm512_add_epi32(v, _mm512_madd_epi16(_mm512_maddubs_epi16(left, right), ones));
        }
    for (const __m512i& v : sum) asm volatile("" : : "v"(v));
}

__attribute__((target("avx512f,avx512vnni"))) void loop_int8_avx512_vnni(long rounds) {
    __m512i sum[16];
    for (__m512i& v : sum) v = _mm512_setzero_si512();
    const __m512i left = _mm512_set1_epi8(3), right = _mm512_set1_epi8(5);
    for (long round = 0; round < rounds; ++round)
        for (__m512i& v : sum) v = _mm512_dpbusd_epi32(v, left, right);
    for (const __m512i& v : sum) asm volatile("" : : "v"(v));
}

__attribute__((target("avx512f,avx512bf16"))) void loop_bf16_avx512(long rounds) {
    __m512 sum[16];
    for (__m512& v : sum) v = _mm512_setzero_ps();
    const __m512bh left = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
    const __m512bh right = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3f), _mm512_set1_ps(2e-3f));
    for (long round = 0; round < rounds; ++round)
        for (__m512& v : sum) v = _mm512_dpbf16_ps(v, left, right);
    for (const __m512& v : sum) asm volatile("" : : "v"(v));
}

// AMX: 8 tiles of 16 rows x 64 bytes; four hold sums, two the left and two the right operand.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("amx-tile"))) void tiles_begin() {
    static const TileConfig config;  // static: gcc's intrinsic admits to reading 8 of its 64 bytes
    alignas(64) static constexpr char ones[16 * 64] = {1, 2, 3, 1, 2, 3, 1, 2, 3};
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
}

__attribute__((target("amx-tile"))) void tiles_end() { _tile_release(); }

__attribute__((target("amx-tile,amx-int8"))) void loop_int8_amx(long rounds) {
    tiles_begin();
    for (long round = 0; round < rounds; ++round) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    tiles_end();
}

__attribute__((target("amx-tile,amx-bf16"))) void loop_bf16_amx(long rounds) {
    tiles_begin();
    for (long round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    tiles_end();
}

// A chain of 64-bit multiplications takes three cycles each on every x86-64 core of the last fifteen years.
void loop_clock(long rounds) {
    std::uint64_t value = sink | 1;
    for (long round = 0; round < rounds; ++round) {
        asm volatile(
            "imul %0, %0\n\timul %0, %0\n\timul %0, %0\n\timul %0, %0\n\t"
            "imul %0, %0\n\timul %0, %0\n\timul %0, %0\n\timul %0, %0"
            : "+r"(value));
    }
    sink = value;
}
#endif

struct OpLoop {
    const char* format;       // int8 | bf16 | fp32 | clock
    const char* instruction;  // what it is made of
    double ops;               // operations (or cycles) a round
    void (*loop)(long rounds);
};

std::vector<OpLoop> op_loops() {
    std::vector<OpLoop> loops;
#if defined(__x86_64__)
    const Features& f = features();
    if (f.amx_int8) loops.push_back({"int8", "amx", 4.0 * 2 * 16 * 16 * 64, loop_int8_amx});
    if (f.amx_bf16) loops.push_back({"bf16", "amx", 4.0 * 2 * 16 * 16 * 32, loop_bf16_amx});
    if (f.avx512_vnni) loops.push_back({"int8", "avx512_vnni", 16.0 * 2 * 64, loop_int8_avx512_vnni});
    if (f.avx512) loops.push_back({"int8", "avx512", 8.0 * 2 * 64, loop_int8_avx512});
    if (f.avx_vnni) loops.push_back({"int8", "avx_vnni", 12.0 * 2 * 32, loop_int8_avx_vnni});
    if (f.avx2_fma) loops.push_back({"int8", "avx2", 8.0 * 2 * 32, loop_int8_avx2});
    if (f.avx512_bf16) loops.push_back({"bf16", "avx512_bf16", 16.0 * 2 * 32, loop_bf16_avx512});
    if (f.avx512) loops.push_back({"fp32", "avx512", 16.0 * 2 * 16, loop_fp32_avx512});
    if (f.avx2_fma) loops.push_back({"fp32", "avx2", 12.0 * 2 * 8, loop_fp32_avx2});
    loops.push_back({"clock", "imul", 8.0 * 3, loop_clock});
#endif
    loops.push_back({"int8", "portable", 8.0 * 2 * 8, loop_int8_portable});
    loops.push_back({"fp32", "portable", 8.0 * 2 * 4, loop_fp32_portable});
    return loops;
}

std::vector<std::tuple<std::string, std::string>> op_kernels() {
    std::vector<std::tuple<std::string, std::string>> names;
    for (const OpLoop& loop : op_loops()) names.emplace_back(loop.format, loop.instruction);
    return names;
}

double op_rate(const std::string& format, const std::string& instruction, int threads, double seconds) {
    if (threads < 1 || threads > 4096) throw std::invalid_argument("threads must be between 1 and 4096");
    for (const OpLoop& op : op_loops()) {
        if (format != op.format || instruction != op.instruction) continue;
        long rounds = 64;  // grown until a sample is long enough for the clock's resolution not to matter
        for (double took = 0; took < 5e-4; rounds *= 2) {
            const double start = seconds_now();
            op.loop(rounds);
            took = seconds_now() - start;
        }
        const double best = best_time(
            threads, 1, seconds, [](int) {}, [&](int, std::size_t) { op.loop(rounds); });
        return threads * op.ops * static_cast<double>(rounds) / best;
    }
    throw std::invalid_argument("no loop for " + format + " by " + instruction + " on this processor");
}

}  // namespace

void bind_ceilings(nanobind::module_& m) {
    namespace nb = nanobind;
    m.def("read_rates", &read_rates, nb::arg("bytes"), nb::arg("threads"), nb::arg("seconds"),
          nb::call_guard<nb::gil_scoped_release>(),
          "[(loop variant, byte/s)]: best rate at which `threads` threads together read a working set of "
          "`bytes` bytes again and again, `seconds` a variant.");
    m.def("op_kernels", &op_kernels, "[(format, instruction)] of the arithmetic loops this processor runs.");
    m.def("op_rate", &op_rate, nb::arg("format"), nb::arg("instruction"), nb::arg("threads"),
          nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
          "Best op/s of one arithmetic loop on `threads` threads together; \"clock\": cycles/s, summed.");
}
