// Checksums of bytes where they have arrived: CRC-64/NVME without its initial and final value, so that those of parts are
// added up by XOR. Polynomials are reflected: bit 63 of a word is the power 0, and words are read lowest byte first.
//
// compile.py makes sums.sm_*.cubin of it. The processor's side is src/device/cuda/sums.rs.

typedef unsigned int u32;
typedef unsigned long long u64;

// As in sums.rs.
#define THREADS 256
#define TILE 8192
#define RUNS 96

// Words of 8 bytes in rows, which are neighbours in their chunk, and begin and end there at whole words.
struct Run {
    u64 address;
    u64 pitch; // bytes from row to row
    u32 row;   // words of a row
    u32 words; // words of all rows
    u32 after; // bytes of the chunk after the last of them
    u32 slot;  // the chunk's place in `sums`
    u32 tiles; // tiles of the runs before this one
    u32 reserved;
};

struct Runs {
    u32 count;
    u32 reserved;
    Run run[RUNS];
};

__device__ u64 step[8][256];    // x^(64 * THREADS), from a thread's word to its next, times byte `value` at `place` of a word
__device__ u64 thread[THREADS]; // x^(64 * (THREADS - i)): thread i's last word, those after it and the 64 zeros of a CRC
__device__ u64 bytes[32];       // x^(8 * 2^i)

#define ONE (1ull << 63)

__device__ __noinline__ static u64 multiply(u64 a, u64 b)
{
    u64 product = 0;
    #pragma unroll 4
    for (int power = 63; power >= 0; power--) {
        product ^= b & (0 - (a >> power & 1));
        b = b >> 1 ^ (0x9a6c9329ac4bc9b5ull & (0 - (b & 1)));
    }
    return product;
}

// x^(64 * n)
__device__ static u64 words(u32 n)
{
    u64 product = ONE, power = 1ull << 55; // x^8
    for (int i = 0; i < 3; i++) power = multiply(power, power);
    for (; n > 0; n /= 2) {
        if (n & 1) product = multiply(product, power);
        power = multiply(power, power);
    }
    return product;
}

// Fills the tables, once: 8 blocks of 256 threads.
extern "C" __global__ void sllm_tables()
{
    const u32 i = threadIdx.x, place = blockIdx.x;
    step[place][i] = multiply(words(THREADS), (u64)i << 8 * place);
    if (place == 0) thread[i] = words(THREADS - i);
    if (place == 1 && i < 32) {
        u64 power = 1ull << 55;
        for (u32 n = 0; n < i; n++) power = multiply(power, power);
        bytes[i] = power;
    }
}

// Adds to sums[slot] what runs are worth in their chunks. A block of threads sums up a tile of a run: TILE words at most, of
// which thread i takes every THREADS-th.
extern "C" __global__ void __launch_bounds__(THREADS) sllm_sums(u64 *sums, const Runs runs)
{
    __shared__ u64 steps[8][256];
    __shared__ u64 part[THREADS];
    const u32 i = threadIdx.x;
    for (u32 place = 0; place < 8; place++) steps[place][i] = step[place][i];

    u32 low = 0, high = runs.count - 1; // the last run that begins at or before this tile is between them
    while (low < high) {
        const u32 middle = (low + high + 1) / 2;
        if (runs.run[middle].tiles <= blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const u64 address = runs.run[low].address, pitch = runs.run[low].pitch;
    const u32 row = runs.run[low].row, all = runs.run[low].words;
    const u32 first = (blockIdx.x - runs.run[low].tiles) * TILE;
    const u32 count = min(all - first, TILE);
    __syncthreads();

    // The last round is full. What the first one lacks is zeros before the tile, which add nothing.
    const u32 rounds = (count + THREADS - 1) / THREADS, lacking = rounds * THREADS - count;
    u64 sum = 0;
    #pragma unroll 1
    for (u32 round = 0; round < rounds; round++) {
        const u32 place = round * THREADS + i;
        u64 word = 0;
        if (place >= lacking) {
            const u32 at = first + place - lacking;
            word = *(const u64 *)(address + at / row * pitch + at % row * 8ull);
        }
        for (u32 byte = 0; byte < 8; byte++) word ^= steps[byte][sum >> 8 * byte & 255];
        sum = word;
    }

    part[i] = multiply(thread[i], sum);
    __syncthreads();
    #pragma unroll 1
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        if (i < half) part[i] ^= part[i + half];
        __syncthreads();
    }
    const u64 total = part[0];
    __syncthreads();

    // x^(8 * bytes after the tile), bit by bit.
    const u32 after = runs.run[low].after + (all - first - count) * 8;
    if (i < 32) part[i] = after >> i & 1 ? bytes[i] : ONE;
    __syncthreads();
    #pragma unroll 1
    for (u32 half = 16; half > 0; half /= 2) {
        if (i < half) part[i] = multiply(part[i], part[i + half]);
        __syncthreads();
    }
    if (i == 0) atomicXor(&sums[runs.run[low].slot], multiply(part[0], total));
}
