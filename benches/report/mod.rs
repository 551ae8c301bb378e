//! What a benchmark prints: a table, or JSON lines (`--json`), and a picture (`--svg FILE`).

use std::env;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use plotters::prelude::*;

/// What was measured, and the same work without the library, measured in turn.
pub struct Metric {
    pub name: String,
    pub unit: Unit,
    pub ours: Vec<f64>,
    /// Empty where there is nothing to compare with.
    pub floor: Vec<f64>,
    /// What the ratio of the medians, or the median where there is no floor, is to be.
    pub bar: Option<Bar>,
}

/// What samples are, and so which of them are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "benchmarks measure different things")]
pub enum Unit {
    /// Microseconds: few are good.
    Micros,
    /// Requests in a second, in thousands: many are good.
    ThousandsPerSecond,
    /// MiB in a second: many are good.
    MibPerSecond,
    /// Events in a second that nobody wanted.
    PerSecond,
    /// VMs in a second: many are good.
    VmsPerSecond,
    /// KiB that something costs.
    Kib,
    /// One figure over another: few are good.
    Times,
    /// Things that are left over.
    Count,
}

#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "benchmarks have different bars")]
pub enum Bar {
    AtLeast(f64),
    AtMost(f64),
}

/// Prints `metrics` as the command line wishes. `floor` says what they are compared with.
pub fn report(metrics: &[Metric], floor: &str) {
    let arguments: Vec<String> = env::args().collect();
    let machine = machine();
    if arguments.iter().any(|argument| argument == "--json") {
        for metric in metrics {
            println!("{}", metric.json());
        }
    } else {
        print_tables(metrics);
        println!("{machine}");
    }
    if let Some(at) = arguments.iter().position(|argument| argument == "--svg") {
        let path = PathBuf::from(arguments.get(at + 1).expect("--svg FILE"));
        draw(metrics, floor, &machine, &path).expect("the picture is drawn");
        eprintln!("{} is drawn", path.display());
    }
}

#[allow(dead_code, reason = "not every benchmark measures times")]
pub fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

impl Metric {
    fn ratio(&self) -> Option<f64> {
        Some(self.percentile(&self.ours, 50)? / self.percentile(&self.floor, 50)?)
    }

    /// What so many percent of the samples, or more, are not worse than: of ten, the 99th percentile is the worst.
    pub fn percentile(&self, samples: &[f64], percent: usize) -> Option<f64> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        if self.unit.many_are_good() {
            sorted.reverse();
        }
        sorted.get(nearest_rank(sorted.len(), percent)).copied()
    }

    /// Whether the bar is met.
    fn is_met(&self) -> Option<bool> {
        let value = self.ratio().or_else(|| self.percentile(&self.ours, 50))?;
        Some(match self.bar? {
            Bar::AtLeast(bar) => value >= bar,
            Bar::AtMost(bar) => value <= bar,
        })
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "metric": self.name,
            "unit": self.unit.short(),
            "n": self.ours.len(),
            "p50": self.percentile(&self.ours, 50),
            "p99": self.percentile(&self.ours, 99),
            "floor_p50": self.percentile(&self.floor, 50),
            "ratio": self.ratio(),
            "bar": self.bar.map(|bar| bar.to_string()),
            "met": self.is_met(),
        })
    }
}

/// Where that percentile is among so many samples, from the best one.
const fn nearest_rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).saturating_sub(1)
}

const _: () = {
    assert!(nearest_rank(10, 99) == 9 && nearest_rank(2, 99) == 1 && nearest_rank(1, 99) == 0);
    assert!(nearest_rank(200, 99) == 197 && nearest_rank(10, 50) == 4 && nearest_rank(10, 0) == 0);
};

impl Unit {
    fn many_are_good(self) -> bool {
        matches!(self, Self::ThousandsPerSecond | Self::MibPerSecond | Self::VmsPerSecond)
    }

    fn short(self) -> &'static str {
        match self {
            Self::Micros => "us",
            Self::ThousandsPerSecond => "k/s",
            Self::MibPerSecond => "MiB/s",
            Self::PerSecond => "1/s",
            Self::VmsPerSecond => "VMs/s",
            Self::Kib => "KiB",
            Self::Times => "x",
            Self::Count => "count",
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Micros => "µs",
            Self::ThousandsPerSecond => "1,000 a second",
            Self::MibPerSecond => "MiB a second",
            Self::PerSecond => "a second",
            Self::VmsPerSecond => "VMs a second",
            Self::Kib => "KiB",
            Self::Times => "times",
            Self::Count => "left over",
        })
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bar) => write!(f, "≥ {bar:.2}"),
            Self::AtMost(bar) => write!(f, "≤ {bar:.2}"),
        }
    }
}

/// A table for each unit; a column of bars where there are any.
fn print_tables(metrics: &[Metric]) {
    for table in metrics.chunk_by(|one, other| one.unit == other.unit) {
        let bars = table.iter().any(|metric| metric.bar.is_some());
        let (head, rule) = if bars { (" bar |", " --- |") } else { ("", "") };
        println!("| {} | n | p50 | p99 | floor p50 | ratio |{head}", table[0].unit);
        println!("| --- | --- | --- | --- | --- | --- |{rule}");
        for metric in table {
            let number = |value: Option<f64>| match value {
                Some(value) if value > 0.0 && value < 10.0 => format!("{value:.1}"),
                Some(value) => format!("{value:.0}"),
                None => String::new(),
            };
            let bar = match (metric.bar, metric.is_met()) {
                (Some(bar), Some(false)) => format!(" {bar}, missed |"),
                (Some(bar), _) => format!(" {bar} |"),
                (None, _) if bars => "  |".to_owned(),
                (None, _) => String::new(),
            };
            println!(
                "| {} | {} | {} | {} | {} | {} |{bar}",
                metric.name,
                metric.ours.len(),
                number(metric.percentile(&metric.ours, 50)),
                number(metric.percentile(&metric.ours, 99)),
                number(metric.percentile(&metric.floor, 50)),
                metric.ratio().map_or(String::new(), |ratio| format!("{ratio:.2}")),
            );
        }
        println!();
    }
}

/// One panel a metric: which share of the samples was done within a time, or below a rate.
fn draw(
    metrics: &[Metric],
    floor: &str,
    machine: &str,
    path: &PathBuf,
) -> Result<(), Box<dyn std::error::Error>> {
    const PANEL: (u32, u32) = (760, 240);
    let height = PANEL.1 * metrics.len() as u32 + 30;
    let root = SVGBackend::new(path, (PANEL.0, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let (panels, foot) = root.split_vertically(height - 30);
    for (metric, panel) in metrics.iter().zip(panels.split_evenly((metrics.len(), 1))) {
        let samples = metric.ours.iter().chain(&metric.floor);
        let last = samples.copied().fold(1.0, f64::max);
        // The slowest few percent would leave the rest no room.
        let worst = [&metric.ours, &metric.floor].map(|s| metric.percentile(s, 95).unwrap_or(0.0));
        let end = match metric.unit {
            Unit::Micros => worst[0].max(worst[1]).min(last) * 1.1,
            _ => last * 1.1,
        };
        let mut chart = ChartBuilder::on(&panel)
            .caption(format!("{} ({})", metric.name, metric.unit), ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(26)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..end, 0.0..100.0)?;
        chart
            .configure_mesh()
            .x_label_formatter(&|us| format!("{us:.0}"))
            .y_label_formatter(&|share| format!("{share:.0} %"))
            .x_labels(10)
            .y_labels(5)
            .light_line_style(WHITE)
            .draw()?;
        for (name, samples, color) in
            [("dormouse", &metric.ours, BLUE), (floor, &metric.floor, RED)]
        {
            if samples.is_empty() {
                continue;
            }
            chart
                .draw_series(LineSeries::new(distribution(samples, end), color.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .border_style(BLACK)
            .background_style(WHITE)
            .draw()?;
    }
    foot.draw_text(machine, &("sans-serif", 12).into_text_style(&foot), (12, 6))?;
    root.present()?;
    Ok(())
}

fn distribution(samples: &[f64], end: f64) -> Vec<(f64, f64)> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let share = |rank: usize| 100.0 * (rank + 1) as f64 / sorted.len() as f64;
    let points = sorted.iter().enumerate().map(|(rank, sample)| (*sample, share(rank)));
    points.take_while(|(sample, _)| *sample <= end).collect()
}

/// Kernel, processor and kind of KVM that the figures belong to.
fn machine() -> String {
    let host = dormouse::Host::check();
    let kvm = format!("{:?}", host.virtualization).to_lowercase();
    let ticks = fs::read_to_string("/proc/version").unwrap_or_default();
    let smp = if ticks.contains("PREEMPT") { "preemptible" } else { "not preemptible" };
    format!("Linux {} ({smp}), {} x {}, ring 0: {kvm}", host.release, host.cpus, host.cpu)
}
