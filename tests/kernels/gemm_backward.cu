// Half of the backward pass of a matrix product, tiled, in CUDA C++, and the bug
// ALB-059: the same kernel instantiated with n and k in the wrong order.
//
//   nvcc -O2 -o gemm_backward tests/kernels/gemm_backward.cu && ./gemm_backward
//
// Of c (m, n) = a (m, k) @ b (k, n) it makes grad_a (m, k) = grad_c (m, n) @ b^T,
// for a head of T = 128 tokens, D = 512 and V = 32768. NC and KC are strides, fixed
// when the kernel is built; m, n and k are guards, given when it is launched. All
// buffers lie in one allocation, as good as neighbours: first grad_a, then the two
// moments of some weight, 65,536 floats each, then whatever a device may hold there.
// It prints, per order, how many floats of each were written. Exit code 77: no device.

#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int TILE = 16;

template <int NC, int KC>
__global__ void backward_a(const float* grad_c, const float* b, float* grad_a,
                           int m, int n, int k) {
  __shared__ float left[TILE][TILE];
  __shared__ float right[TILE][TILE + 1];  // one more: columns in different banks
  const int x = threadIdx.x, y = threadIdx.y;
  const int row = blockIdx.y * TILE + y, col = blockIdx.x * TILE + x;
  const int other = blockIdx.x * TILE + y;  // the row of b that this thread loads
  float total = 0.0f;
  for (int start = 0; start < NC; start += TILE) {
    const int at = start + x;
    left[y][x] = row < m && at < n ? grad_c[row * NC + at] : 0.0f;
    right[y][x] = other < k && at < n ? b[other * NC + at] : 0.0f;
    __syncthreads();
    for (int i = 0; i < TILE; ++i) total += left[y][i] * right[x][i];
    __syncthreads();
  }
  if (row < m && col < k) grad_a[row * KC + col] = total;
}

constexpr int T = 128, D = 512, V = 32768;
constexpr int BUFFER = T * D;               // floats: 256 KiB
constexpr int ARENA = (T - 1) * V + D;      // up to the last float of the last row

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Fill the arena with NaN, run the kernel, say which floats are numbers now.
template <int NC, int KC>
void run(const char* order, const float* grad_c, const float* b, float* arena) {
  check(cudaMemset(arena, 0xff, ARENA * sizeof(float)));
  const dim3 threads(TILE, TILE), blocks((D + TILE - 1) / TILE, (T + TILE - 1) / TILE);
  backward_a<NC, KC><<<blocks, threads>>>(grad_c, b, arena, T, V, D);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
  std::vector<float> seen(ARENA);
  check(cudaMemcpy(seen.data(), arena, ARENA * sizeof(float), cudaMemcpyDeviceToHost));
  int written[4] = {0, 0, 0, 0}, negative = 0;
  for (int i = 0; i < ARENA; ++i) {
    const int buffer = i / BUFFER < 3 ? i / BUFFER : 3;
    written[buffer] += seen[i] == seen[i];
    negative += buffer == 2 && seen[i] < 0.0f;
  }
  std::printf("%s grad_a %d m %d v %d beyond %d negative_v %d\n", order, written[0],
              written[1], written[2], written[3], negative);
}

// A number in (-1, 1) that depends on i alone: the same on every machine.
float noise(unsigned i) {
  i = (i ^ 61u) ^ (i >> 16);
  i *= 9u;
  i ^= i >> 4;
  i *= 0x27d4eb2du;
  i ^= i >> 15;
  return (static_cast<float>(i % 20001u) - 10000.5f) / 10001.0f;
}

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device");
    return 77;
  }
  // Away from its targets, a new model's grad_c is nearly 1 / (V * T) everywhere.
  std::vector<float> grad_c(T * V, 1.0f / V / T), b(D * V);
  for (int i = 0; i < D * V; ++i) b[i] = 0.02f * noise(i);
  float *device_c, *device_b, *arena;
  check(cudaMalloc(&device_c, grad_c.size() * sizeof(float)));
  check(cudaMalloc(&device_b, b.size() * sizeof(float)));
  check(cudaMalloc(&arena, ARENA * sizeof(float)));
  check(cudaMemcpy(device_c, grad_c.data(), grad_c.size() * sizeof(float),
                   cudaMemcpyHostToDevice));
  check(cudaMemcpy(device_b, b.data(), b.size() * sizeof(float),
                   cudaMemcpyHostToDevice));
  run<V, D>("right", device_c, device_b, arena);
  run<D, V>("swapped", device_c, device_b, arena);
  check(cudaFree(device_c));
  check(cudaFree(device_b));
  check(cudaFree(arena));
  return 0;
}
