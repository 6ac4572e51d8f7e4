#include "checks.hpp"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace sec {

#ifdef _WIN32

namespace {

struct Handle {
    HANDLE file;
    ~Handle() {
        if (file != INVALID_HANDLE_VALUE) CloseHandle(file);
    }
};

std::wstring wide(const std::string& path) {
    if (path.empty() || path.size() > 32767) refuse("the path is empty or too long");
    const int size = static_cast<int>(path.size());
    const int length = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path.data(), size, nullptr, 0);
    if (length <= 0) refuse("the path is not UTF-8");
    std::wstring out(static_cast<size_t>(length), L'\0');
    MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path.data(), size, &out[0], length);
    return out;
}

}  // namespace

Mapping::Mapping(const std::string& path) {
    const Handle handle{CreateFileW(wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING,
                                    FILE_ATTRIBUTE_NORMAL, nullptr)};
    LARGE_INTEGER length;
    if (handle.file == INVALID_HANDLE_VALUE || !GetFileSizeEx(handle.file, &length))
        refuse("cannot open " + quoted(path));
    if (length.QuadPart <= 0) refuse(quoted(path) + " is empty");
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[static_cast<size_t>(length.QuadPart)]);
    for (size_t at = 0; at < static_cast<size_t>(length.QuadPart);) {
        const size_t left = static_cast<size_t>(length.QuadPart) - at;
        DWORD got = 0;
        const DWORD want = static_cast<DWORD>(std::min<size_t>(left, size_t{1} << 30));
        if (!ReadFile(handle.file, bytes.get() + at, want, &got, nullptr) || got == 0)
            refuse("cannot read " + quoted(path));
        at += got;
    }
    size_ = static_cast<size_t>(length.QuadPart);
    data_ = bytes.release();
}

Mapping::~Mapping() { delete[] data_; }

void Mapping::forget() const {}

#else

namespace {

struct Descriptor {
    int fd;
    ~Descriptor() {
        if (fd >= 0) close(fd);
    }
};

}  // namespace

Mapping::Mapping(const std::string& path) {
    // Non-blocking: opening a pipe that nobody writes to would otherwise wait for ever.
    const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    struct stat info;
    if (file.fd < 0 || fstat(file.fd, &info) != 0)
        refuse("cannot open " + quoted(path) + ": " + std::strerror(errno));
    if (!S_ISREG(info.st_mode)) refuse(quoted(path) + " is not a file");
    if (info.st_size <= 0) refuse(quoted(path) + " is empty");
    const auto size = static_cast<size_t>(info.st_size);
    void* const at = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
    if (at == MAP_FAILED) throw Error(SEC_ERROR_MEMORY, "cannot map " + quoted(path) + ": " + std::strerror(errno));
    data_ = static_cast<const uint8_t*>(at);
    size_ = size;
}

Mapping::~Mapping() {
    if (data_) munmap(const_cast<uint8_t*>(data_), size_);
}

void Mapping::forget() const { madvise(const_cast<uint8_t*>(data_), size_, MADV_DONTNEED); }

#endif

}  // namespace sec
