/*
 * Denoises pictures by ExecuTorch inside an arm64 root, one thread; see arm64.py beside this folder.
 *
 *     executorch_pictures MODEL NOISY DENOISED PICTURES SIGMA
 *
 * NOISY holds pictures of 256 x 256 float32; PICTURES of them are denoised, from the first on and over again. DENOISED is
 * "-" where nothing shall be written. ExecuTorch's Python would load torch first.
 */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

// The wheel has the library of threadpool.h, and not the header.
namespace executorch::extension::threadpool {
class ThreadPool {
public:
    bool _unsafe_reset_threadpool(unsigned threads);
};
ThreadPool *get_threadpool();
}  // namespace executorch::extension::threadpool

namespace et = executorch::extension;

constexpr int SIDE = 256;
constexpr size_t FLOATS = static_cast<size_t>(SIDE) * SIDE;

int main(int count, char **arguments)
{
    if (count != 6) {
        std::fprintf(stderr, "usage: executorch_pictures MODEL NOISY DENOISED PICTURES SIGMA\n");
        return 2;
    }
    et::threadpool::get_threadpool()->_unsafe_reset_threadpool(1);
    std::ifstream file(arguments[2], std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    std::vector<float> noisy(bytes.size() / sizeof(float));
    if (noisy.empty() || noisy.size() % FLOATS) {
        std::fprintf(stderr, "%s: does not hold whole pictures\n", arguments[2]);
        return 2;
    }
    std::memcpy(noisy.data(), bytes.data(), noisy.size() * sizeof(float));
    std::ofstream denoised;
    if (std::strcmp(arguments[3], "-"))
        denoised.open(arguments[3], std::ios::binary);

    et::Module model(arguments[1]);
    float sigma = std::strtof(arguments[5], nullptr);
    auto level = et::make_tensor_ptr({1, 1, 1, 1}, &sigma);
    for (int index = 0; index < std::atoi(arguments[4]); ++index) {
        float *first = noisy.data() + index * FLOATS % noisy.size();
        auto result = model.forward({et::make_tensor_ptr({1, 1, SIDE, SIDE}, first), level});
        if (!result.ok()) {
            std::fprintf(stderr, "%s: ExecuTorch's error %d\n", arguments[1], static_cast<int>(result.error()));
            return 4;
        }
        const auto *made = reinterpret_cast<const char *>(result->at(0).toTensor().const_data_ptr<float>());
        if (denoised.is_open())
            denoised.write(made, FLOATS * sizeof(float));
    }
    return 0;
}
