// Device queries and kernel launches of the host, for nvcc and g++.
#pragma once

#include <cstdint>

namespace reweight_ops {

/// `status` is not 0 if there is no such device.
struct Device {
    int status, processors, l2_bytes;
    int major;         // major compute capability
    int shared_bytes;  // the most that a block can have
};

struct Shape {
    int64_t blocks;
    int threads, cluster = 1, shared_bytes = 0;
};

}  // namespace reweight_ops

#if !defined(RW_EMULATION)

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>

namespace reweight_ops {

inline Device device_of(int index) {
    Device d{};
    const auto get = [&](int& to, cudaDeviceAttr what) {
        if (!d.status) d.status = cudaDeviceGetAttribute(&to, what, index);
    };
    get(d.processors, cudaDevAttrMultiProcessorCount);
    get(d.l2_bytes, cudaDevAttrL2CacheSize);
    get(d.major, cudaDevAttrComputeCapabilityMajor);
    get(d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return d;
}

/// Calls f() with `device` current, then restores the thread's device. Returns the first status
/// that is not 0.
template <class F>
int on_device(int device, const F& f) {
    int before = 0;
    cudaError_t status = cudaGetDevice(&before);
    if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    status = f();
    const cudaError_t restored = before != device ? cudaSetDevice(before) : cudaSuccess;
    return status != cudaSuccess ? status : restored;
}

/// `attribute` must outlive the returned configuration.
inline cudaLaunchConfig_t configuration(const Shape& shape, void* stream, cudaLaunchAttribute& attribute) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(shape.blocks));
    config.blockDim = dim3(unsigned(shape.threads));
    config.dynamicSmemBytes = size_t(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(shape.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = shape.shared_bytes > 0;
    return config;
}

/// Launches on call.stream of call.device. Returns the CUDA status.
template <class Call>
int launch(void (*kernel)(const Call), const Shape& shape, const Call& call) {
    return on_device(call.device, [&] {
        cudaLaunchAttribute attribute;
        const cudaLaunchConfig_t config = configuration(shape, call.stream, attribute);
        void* arguments[] = {const_cast<Call*>(&call)};
        return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
    });
}

/// Sets `count` to the number of clusters of a kernel that the device runs at once; 0 means that it
/// cannot run one. The device is asked once per kernel, device and cluster size. Call this before
/// the first launch: it also grants the kernel its shared memory. Returns a status.
template <class Call>
int active_clusters(void (*kernel)(const Call), const Shape& shape, int device, int& count) {
    static std::mutex mutex;
    static std::map<std::tuple<void (*)(const Call), int, int>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(kernel, device, shape.cluster);
    const auto found = known.find(key);
    if (found != known.end()) {
        count = found->second;
        return cudaSuccess;
    }
    const int status = on_device(device, [&] {
        const void* const function = reinterpret_cast<const void*>(kernel);
        cudaError_t done = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
        if (done != cudaSuccess) return done;
        Shape one = shape;
        one.blocks = shape.cluster;
        cudaLaunchAttribute attribute;
        const cudaLaunchConfig_t config = configuration(one, nullptr, attribute);
        done = cudaOccupancyMaxActiveClusters(&count, function, &config);
        if (done == cudaErrorInvalidClusterSize) {  // this device lacks such clusters
            count = 0;
            cudaGetLastError();
            return cudaSuccess;
        }
        return done;
    });
    if (status == cudaSuccess) known[key] = count;
    return status;
}

}  // namespace reweight_ops

#else
#include "platform.h"
#endif
