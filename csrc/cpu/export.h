// Everything is hidden but what the control module calls across the library's boundary.
#pragma once

#define SPO_EXPORT __attribute__((visibility("default")))
