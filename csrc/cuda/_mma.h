// The two warp-wide instructions of the half precision products. In the host build they are emulated, with the same
// layout of fragments over lanes (PTX ISA, "Matrix Fragments for mma.m16n8k16").
#pragma once

#include "_device.h"

namespace dcvit {

// Four 8 x 8 matrices of 16-bit numbers, one register of each per lane.
struct Fragments {
  uint32_t r[4];
};

#ifdef DCVIT_HOST

// Lane l names row l % 8 of matrix l / 8 by its first element, and gets two neighbours of row l / 4 of each matrix; of
// column l / 4 if they are transposed on the way.
template <bool kTransposed, class T>
Fragments load_matrices(View<T> shared, int64_t i, int line = __builtin_LINE()) {
  return host::collective<Fragments>(
      load_vec<8>(shared, i, line),
      [](host::Exchange& exchange) {
        for (int lane = 0; lane < kWarp; ++lane) {
          uint16_t numbers[4][2];
          for (int matrix = 0; matrix < 4; ++matrix)
            for (int e = 0; e < 2; ++e) {
              const int pair = 2 * (lane % 4) + e;
              const int row = kTransposed ? pair : lane / 4, column = kTransposed ? lane / 4 : pair;
              std::memcpy(&numbers[matrix][e], exchange.in[matrix * 8 + row] + 2 * column, 2);
            }
          std::memcpy(exchange.out[lane], numbers, sizeof(numbers));
        }
      },
      line);
}

// c += a b for a [16, 16] and b [16, 8].
template <class T>
void multiply_add(float (&c)[4], const Fragments& a, uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  struct In {
    Fragments a;
    uint32_t b[2];
  };
  struct Out {
    float c[4];
  };
  const Out products = host::collective<Out>(
      In{a, {b0, b1}},
      [](host::Exchange& exchange) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < kWarp; ++lane) {
          T numbers[12];
          std::memcpy(numbers, exchange.in[lane], sizeof(In));
          for (int r = 0; r < 4; ++r)
            for (int e = 0; e < 2; ++e)
              left[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + e + 8 * (r / 2)] = static_cast<float>(numbers[2 * r + e]);
          for (int r = 0; r < 2; ++r)
            for (int e = 0; e < 2; ++e)
              right[2 * (lane % 4) + e + 8 * r][lane / 4] = static_cast<float>(numbers[8 + 2 * r + e]);
        }
        for (int lane = 0; lane < kWarp; ++lane) {
          float c[4];
          for (int i = 0; i < 4; ++i) {
            c[i] = 0;
            for (int k = 0; k < 16; ++k) c[i] += left[lane / 4 + 8 * (i / 2)][k] * right[k][2 * (lane % 4) + i % 2];
          }
          std::memcpy(exchange.out[lane], c, sizeof(c));
        }
      },
      line);
  for (int i = 0; i < 4; ++i) c[i] += products.c[i];
}

#else

template <bool kTransposed, class T>
DCVIT_D Fragments load_matrices(View<T> shared, int64_t i) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared.data + i));
  Fragments f;
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(address)
                 : "memory");
  return f;
}

template <class T>
DCVIT_D void multiply_add(float (&c)[4], const Fragments& a, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace dcvit
