// A CUDA driver (libcuda.so.1) without a GPU, for test_cuda_launch.py: two devices that load every image and write
// down what is launched. Only what Numba and NVIDIA's Python bindings call on the way to a launch is there.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include <dlfcn.h>

namespace {

constexpr int success = 0, invalid_value = 1, invalid_device = 101, invalid_context = 201, invalid_handle = 400, not_found = 500;
constexpr int devices = 2;

struct Context { int device; };
Context contexts[devices] = {{0}, {1}};
thread_local std::vector<Context*> current;  // the thread's stack

struct Library { std::string image; std::string kernel; bool is_loaded = true; };
std::string record;

int attribute_of_device(int attribute) {
    switch (attribute) {
        case 75: return 9;        // compute capability 9.0
        case 76: return 0;
        case 16: return 132;      // multiprocessors
        case 10: return 32;       // threads of a warp
        case 8: return 48 << 10;  // shared memory of a block
        default: return 1024;
    }
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return success; }
int cuDriverGetVersion(int* version) { *version = 13000; return success; }
int cuDeviceGet(int* device, int number) { *device = number; return number < devices ? success : invalid_device; }
int cuDeviceGetCount(int* count) { *count = devices; return success; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute_of_device(attribute); return success; }
int cuDeviceGetName(char* name, int size, int) { snprintf(name, size, "recorder"); return success; }
int cuDeviceGetUuid(char* uuid, int device) { memset(uuid, device, 16); return success; }
int cuDevicePrimaryCtxRetain(Context** context, int device) { *context = &contexts[device]; return success; }
int cuDevicePrimaryCtxRelease(int) { return success; }
int cuGetErrorName(int error, const char** name) { *name = error ? "CUDA_ERROR" : "CUDA_SUCCESS"; return success; }
int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

int cuCtxGetCurrent(Context** context) { *context = current.empty() ? nullptr : current.back(); return success; }
int cuCtxSetCurrent(Context* context) {
    if (!current.empty()) current.pop_back();
    if (context) current.push_back(context);
    return success;
}
int cuCtxPushCurrent(Context* context) { current.push_back(context); return success; }
int cuCtxPopCurrent(Context** context) {
    if (current.empty()) return invalid_context;
    *context = current.back();
    current.pop_back();
    return success;
}
int cuCtxGetDevice(int* device) {
    if (current.empty()) return invalid_context;
    *device = current.back()->device;
    return success;
}

int cuMemGetInfo(size_t* free_bytes, size_t* bytes) {
    *free_bytes = *bytes = size_t(80) << 30;
    return current.empty() ? invalid_context : success;
}
int cuLibraryLoadData(Library** library, const char* image, void*, void*, unsigned, void*, void*, unsigned) {
    uint64_t headers;  // of a cubin, which is an ELF file: the section headers are last
    uint16_t size, count;
    memcpy(&headers, image + 0x28, 8);
    memcpy(&size, image + 0x3a, 2);
    memcpy(&count, image + 0x3c, 2);
    *library = new Library{std::string(image, headers + size_t(size) * count), ""};
    return success;
}
int cuLibraryUnload(Library* library) { library->is_loaded = false; return success; }
int cuLibraryGetKernel(Library** kernel, Library* library, const char* name) {
    library->kernel = name;
    *kernel = library;
    return library->image.find(name) == std::string::npos ? not_found : success;
}
int cuKernelGetAttribute(int* value, int, void*, int) { *value = 64; return success; }

int cuLaunchKernel(Library* kernel, unsigned grid, unsigned, unsigned, unsigned block, unsigned, unsigned,
                   unsigned shared, void* stream, void** parameters, void**) {
    if (current.empty()) return invalid_context;
    if (!kernel->is_loaded) return invalid_handle;
    if (shared > unsigned(attribute_of_device(8))) return invalid_value;
    char text[128];
    snprintf(text, sizeof text, " device %d grid %u block %u shared %u stream %lu", current.back()->device, grid, block,
             shared, (unsigned long)stream);
    record = kernel->kernel + text;
    // The letters at the end of a mangled name are the types: y uint64, j uint32, f float32.
    size_t types = kernel->kernel.find_last_not_of("yjf") + 1;
    for (; types < kernel->kernel.size(); ++types, ++parameters) {
        uint64_t word = 0;
        memcpy(&word, *parameters, kernel->kernel[types] == 'y' ? 8 : 4);
        record += " " + std::to_string(word);
    }
    return success;
}
const char* last_launch() { return record.c_str(); }

int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    Dl_info own;
    dladdr((void*)cuInit, &own);
    static void* library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(library, name);
    if (status) *status = *function ? 0 : 1;
    return *function ? success : not_found;
}

}  // extern "C"
