// CUB's device-wide sum behind a C interface, for `benches/peer/cub.rs` to load.
//
//     nvcc -O3 -shared -Xcompiler -fPIC -gencode arch=compute_90,code=sm_90 \
//         -o libkasmina_cub.so cub.cu
//
// and KASMINA_CUB names the result. For another GPU than Hopper, take its architecture for 90.

#include <cub/device/device_reduce.cuh>
#include <cub/version.cuh>

// Both elements of a 32-bit word, the first in its low half.
struct PairToF32 {
    __device__ float operator()(unsigned pair) const {
        return __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
    }
};

extern "C" int kasmina_cub_version() { return CUB_VERSION; }

// Both enqueue the sum of `len` words on `stream`; with a null `temp`, they only say how many
// bytes it needs. A 32-bit length selects CUB's faster offset arithmetic. They return a
// cudaError_t.

extern "C" int kasmina_cub_sum_f32(void *temp, size_t *temp_bytes, const float *data, float *sum,
                                   int len, cudaStream_t stream) {
    return cub::DeviceReduce::Sum(temp, *temp_bytes, data, sum, len, stream);
}

// Elements in pairs, because CUB loads single 16-bit elements one by one instead of 16 bytes at a
// time. In f32, because the element's own type would lose the sum's digits.
extern "C" int kasmina_cub_sum_bf16(void *temp, size_t *temp_bytes, const unsigned *data,
                                    float *sum, int len, cudaStream_t stream) {
    return cub::DeviceReduce::TransformReduce(temp, *temp_bytes, data, sum, len,
                                              cuda::std::plus<float>{}, PairToF32{}, 0.0f, stream);
}
