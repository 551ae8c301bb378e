//! What a benchmark prints: a table, or JSON lines (`--json`), and a picture (`--svg FILE`).

use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use plotters::prelude::*;

/// What was measured, and the same work without the library, measured in turn.
pub struct Metric {
    pub name: String,
    pub ours: Vec<Duration>,
    /// Empty where there is nothing to compare with.
    pub floor: Vec<Duration>,
}

/// Prints `metrics` as the command line wishes.
pub fn report(metrics: &[Metric]) {
    let arguments: Vec<String> = env::args().collect();
    let machine = machine();
    if arguments.iter().any(|argument| argument == "--json") {
        for metric in metrics {
            println!("{}", metric.json());
        }
    } else {
        print_table(metrics);
        println!("\n{machine}");
    }
    if let Some(at) = arguments.iter().position(|argument| argument == "--svg") {
        let path = PathBuf::from(arguments.get(at + 1).expect("--svg FILE"));
        draw(metrics, &machine, &path).expect("the picture is drawn");
        eprintln!("{} is drawn", path.display());
    }
}

impl Metric {
    fn ratio(&self) -> Option<f64> {
        let floor = percentile(&self.floor, 50)?;
        Some(percentile(&self.ours, 50)? / floor)
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "metric": self.name,
            "unit": "us",
            "n": self.ours.len(),
            "p50": percentile(&self.ours, 50),
            "p99": percentile(&self.ours, 99),
            "floor_p50": percentile(&self.floor, 50),
            "ratio": self.ratio(),
        })
    }
}

fn print_table(metrics: &[Metric]) {
    println!("| µs | n | p50 | p99 | floor p50 | ratio |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for metric in metrics {
        let number = |value: Option<f64>| value.map_or(String::new(), |us| format!("{us:.0}"));
        println!(
            "| {} | {} | {} | {} | {} | {} |",
            metric.name,
            metric.ours.len(),
            number(percentile(&metric.ours, 50)),
            number(percentile(&metric.ours, 99)),
            number(percentile(&metric.floor, 50)),
            metric.ratio().map_or(String::new(), |ratio| format!("{ratio:.2}")),
        );
    }
}

/// One panel a metric: which share of the samples was done within a time.
fn draw(
    metrics: &[Metric],
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
        let last = samples.map(|sample| micros(*sample)).fold(1.0, f64::max);
        // The last few percent would leave the rest no room.
        let end = [&metric.ours, &metric.floor].map(|s| percentile(s, 95).unwrap_or(0.0));
        let end = end[0].max(end[1]).min(last) * 1.1;
        let mut chart = ChartBuilder::on(&panel)
            .caption(format!("{} (µs)", metric.name), ("sans-serif", 15))
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
            [("dormouse", &metric.ours, BLUE), ("raw KVM", &metric.floor, RED)]
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

fn distribution(samples: &[Duration], end: f64) -> Vec<(f64, f64)> {
    let mut sorted: Vec<f64> = samples.iter().map(|sample| micros(*sample)).collect();
    sorted.sort_by(f64::total_cmp);
    let share = |rank: usize| 100.0 * (rank + 1) as f64 / sorted.len() as f64;
    let points = sorted.iter().enumerate().map(|(rank, us)| (*us, share(rank)));
    points.take_while(|(us, _)| *us <= end).collect()
}

fn percentile(samples: &[Duration], percent: usize) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().checked_sub(1)?;
    Some(micros(sorted[last * percent / 100]))
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// Kernel, processor and kind of KVM that the figures belong to.
fn machine() -> String {
    let host = dormouse::Host::check();
    let kvm = format!("{:?}", host.virtualization).to_lowercase();
    let ticks = fs::read_to_string("/proc/version").unwrap_or_default();
    let smp = if ticks.contains("PREEMPT") { "preemptible" } else { "not preemptible" };
    format!("Linux {} ({smp}), {} x {}, ring 0: {kvm}", host.release, host.cpus, host.cpu)
}
